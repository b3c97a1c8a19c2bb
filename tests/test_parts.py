"""Several processes, one output: every row is answered by one of them, and parts in order are the whole."""

import pytest

from jaxspec.config import UserError
from jaxspec.store.parts import merge, own_rows, part_file, unfinished


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
@pytest.mark.parametrize("number", [0, 1, 5, 20])
def test_every_row_has_one_process_and_no_process_more_than_its_share(number, processes):
    rows = [own_rows(number, process, processes) for process in range(processes)]
    assert [i for own in rows for i in own] == list(range(number))
    assert max(map(len, rows)) - min(map(len, rows)) <= 1


def answer(output, number, process, processes):
    lines = [f'{{"id": {i}, "text": "Zeile\\u2028 ü {i}"}}\n' for i in own_rows(number, process, processes)]
    part_file(output, process, processes).write_text("".join(lines))


def test_a_job_goes_on_with_the_part_that_is_lost(tmp_path):
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    answer(whole, 11, 0, 1)
    merge(whole, 11, 1)
    for process in range(3):
        answer(output, 11, process, 3)
    assert {file.name for file in tmp_path.iterdir()} >= {"out-00000-of-00003.jsonl", "out-00002-of-00003.jsonl"}
    part_file(output, 1, 3).unlink()
    assert unfinished(output, 11, 3) == [1]
    with pytest.raises(UserError, match=r"out-00001-of-00003\.jsonl has not all of its lines; start process 1 of 3"):
        merge(output, 11, 3)
    assert not output.exists()
    answer(output, 11, 1, 3)
    merge(output, 11, 3)
    assert output.read_bytes() == whole.read_bytes()


def test_a_torn_last_line_is_not_an_answer(tmp_path):
    output = tmp_path / "out.jsonl"
    for process in range(2):
        answer(output, 6, process, 2)
    part = part_file(output, 1, 2)
    part.write_bytes(part.read_bytes()[:-3])
    assert unfinished(output, 6, 2) == [1]
