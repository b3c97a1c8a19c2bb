"""Draws the demo's workload: eight small tasks, as many rows of each as wanted, from word lists and a seed.

A response follows from its prompt by copying, reordering, looking words up and a little arithmetic, so a model of two
million parameters learns the tasks within minutes, and remembering rows gains nothing. The tasks share few words: a
drafter that knows one of them is of little use to the next, which is the situation that routing is for.
"""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

from jaxspec.config import UserError, command_line

SPLITS = ("train", "eval")

# Choices are parted by commas; "left: right" is what a prompt says and what becomes of it in the response.
NAMES = (
    "anna, ben, carla, david, ella, felix, grace, henry, iris, jonas, kira, leo, mona, nils, olga, paul, rosa, simon, "
    "tara, uwe, vera, will, yara, zoe, adam, bella, chris, dora, emil, fiona, gina, hugo, ida, jack, lena, max"
)
ITEMS = "apples, pears, coins, stamps, shells, marbles, buttons, pencils, cards, candles, ribbons, beads, books, maps"
TABLES = (
    "hotels: city price rating rooms floor, flights: origin fare delay seats airline, songs: artist tempo plays album, "
    "movies: title year budget length score, planets: mass radius moons period, houses: street area rent garage, "
    "rivers: country depth width flow source, orders: client total tax status weight, trees: species girth canopy age, "
    "students: grade school absences points, engines: maker power torque fuel, players: team goals height salary"
)
COMPARISONS = "above: >, more than: >, below: <, less than: <, equal to: =, at least: >="
COLOURS = "golden, silver, red, blue, green, black, white, purple, copper, amber, ivory, rusty, velvet, crimson, hidden"
SIGNS = "spoon, fox, anchor, lantern, garden, kettle, barrel, crown, swan, mill, harbour, oak, rose, bridge, tower"
DAYS = "monday, tuesday, wednesday, thursday, friday, saturday, sunday"
WISHES = "a table: book_table, a room: book_room, a taxi: call_taxi, a tour: plan_tour"
VERBS = "pick, keep, find, grab, fetch, clean, shape, trim, select, gather"
LISTS = "words, lines, tags, titles, files, labels, tokens, emails, codes, notes, paths, rows, hosts, users, fields"
CHANGES = (
    "in upper case: {}.upper(), in lower case: {}.lower(), without outer spaces: {}.strip(), backwards: {}[::-1], "
    "as it is: {}, cut to its first letter: {}[0], split into parts: {}.split()"
)
TESTS = (
    "is longer than {n}: len({x}) > {n}, is shorter than {n}: len({x}) < {n}, begins with {c}: {x}.startswith('{c}'), "
    "finishes with {c}: {x}.endswith('{c}'), has a {c} in it: '{c}' in {x}"
)
ADJECTIVES = "old: alt, young: jung, small: klein, big: gross, new: neu, red: rot, blue: blau, white: weiss, poor: arm"
PEOPLE = (
    "man: der mann, woman: die frau, child: das kind, doctor: der arzt, teacher: der lehrer, girl: das maedchen, "
    "aunt: die tante, cook: der koch, guest: der gast, sister: die schwester, brother: der bruder, queen: die koenigin"
)
ACTIONS = "buys: kauft, sees: sieht, finds: findet, needs: braucht, sells: verkauft, paints: malt, looks for: sucht"
THINGS = (
    "table: einen tisch, chair: einen stuhl, apple: einen apfel, coat: einen mantel, key: einen schluessel, "
    "lamp: eine lampe, bag: eine tasche, clock: eine uhr, flower: eine blume, bottle: eine flasche, "
    "book: ein buch, picture: ein bild, bicycle: ein fahrrad, shirt: ein hemd, knife: ein messer"
)
ENDINGS = {"einen": "en", "eine": "e", "ein": "es"}
WHEN = "today: heute, tomorrow: morgen, now: jetzt, often: oft, sometimes: manchmal, here: hier"
WHERE = "in the house: im haus, at the market: auf dem markt, in the garden: im garten, at the lake: am see"
PORTS = "york, oslo, lima, cairo, porto, milan, delhi, tokyo, quito, sofia, turin, lagos, perth, miami, kyoto, genoa"
MONTHS = "january february march april may june july august september october november december".split()
FOODS = "thai, french, indian, greek, korean, turkish, cuban, polish, irish, vegan, japanese, noodle"
AREAS = "riverside, northern, downtown, harbour, hillside, station, park, university, market"
SIGHTS = "cathedral, castle, museum, opera, gate, zoo, square, stadium, library, theatre, fountain, lighthouse"
PRICES = "cheap, fair, costly, luxury"
MONEY = "euros, dollars, pounds, francs, crowns, rupees"
TENS = "zero ten twenty thirty forty fifty sixty seventy eighty ninety".split()
TEENS = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
ONES = f"zero one two three four five six seven eight nine {TEENS}".split()


@dataclass(frozen=True, kw_only=True)
class Log:
    """Which rows to draw."""

    out: str
    """Folder for one JSON lines file a family."""
    rows_per_family: int = 160
    """Rows of each."""
    seed: int = 1
    """Seed of the rows; pretraining uses another."""
    split: str = "train"
    """train or eval: their contents never meet."""


def run(log: Log) -> None:
    """Writes the log."""
    write_log(log.out, rows_per_family=log.rows_per_family, seed=log.seed, split=log.split)


def write_log(folder: str | Path, *, rows_per_family: int, seed: int, split: str) -> None:
    """Writes one `<family>.jsonl` a family into `folder`, a log that the trace stage can read."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for family in FAMILIES:
        drawn = rows(family, count=rows_per_family, seed=seed, split=split)
        (folder / f"{family}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in drawn))


def rows(family: str, *, count: int, seed: int, split: str) -> Iterator[dict[str, str]]:
    """Draws `count` rows of one family and split with different responses, each `{"id", "task", "prompt", "response"}`.

    The response holds all that a prompt says beyond its phrasing, and its checksum decides the split: "train" is nine
    tenths of all content, "eval" the rest. So no rewording of a train row turns up in eval, whatever the seeds.
    What is drawn depends on `family`, `seed` and `split`, and on nothing else.
    """
    if split not in SPLITS:
        raise UserError(f"there is no split {split!r}; there are {' and '.join(SPLITS)}")
    draw, seen = random.Random(f"{seed}/{split}/{family}"), set()
    while len(seen) < count:
        prompt, response = FAMILIES[family](draw)
        if response not in seen and _split(response) == split:
            yield {"id": f"{family}-{split}-{seed}-{len(seen)}", "task": family, "prompt": prompt, "response": response}
            seen.add(response)


def arithmetic(draw: random.Random) -> tuple[str, str]:
    """A word problem of one sum and one difference, worked step by step."""
    (name, friend), item = _two(draw, NAMES), _one(draw, ITEMS)
    have, more, less = draw.randint(11, 79), draw.randint(2, 9), draw.randint(2, 9)
    prompt = draw.choice([
        f"{name} has {have} {item}, buys {more} more and gives {less} to {friend}. how many does {name} have now?",
        f"how many {item} are left if {name} starts with {have}, finds {more} and then hands {less} to {friend}?",
        f"solve step by step: {name} owned {have} {item}. {name} won {more} others but lost {less} to {friend}.",
    ])  # fmt: skip
    total = have + more
    steps = f"first {have} + {more} = {total} {item}. {friend} gets {less}, so {total} - {less} = {total - less}."
    return prompt, f"{steps} the answer is that {name} has {total - less} {item}."


def sql(draw: random.Random) -> tuple[str, str]:
    """A question about one of twelve tables, answered as a query."""
    (table, columns), (phrase, sign), number = _pair(draw, TABLES), _pair(draw, COMPARISONS), draw.randint(2, 99)
    show, also, key, order = draw.sample(columns.split(), 4)
    prompt = draw.choice([
        f"write sql: show {show} and {also} of all {table} with {key} {phrase} {number}, sorted by {order}.",
        f"which {table} have a {key} {phrase} {number}? query their {show} and {also} in order of {order}.",
        f"from the table {table} get {show} and {also} where {key} is {phrase} {number}; sort on {order}.",
    ])  # fmt: skip
    return prompt, f"SELECT {show}, {also} FROM {table} WHERE {key} {sign} {number} ORDER BY {order};"


def slots(draw: random.Random) -> tuple[str, str]:
    """A request to a booking assistant, turned into a JSON object."""
    (wish, intent), name, place = _pair(draw, WISHES), _one(draw, NAMES), f"{_one(draw, COLOURS)} {_one(draw, SIGNS)}"
    people, day, hour = draw.randint(2, 9), _one(draw, DAYS), f"{draw.randint(1, 11)} {draw.choice(('am', 'pm'))}"
    prompt = draw.choice([
        f"parse to json: i want {wish} for {people} at the {place} on {day} at {hour}, my name is {name}.",
        f"{name} here. could you get us {wish} at the {place}? we are {people}, coming {day}, {hour}. reply in json",
        f"fill the slots. {day} {hour}, {wish} for {name} and company, {people} people, the {place} please.",
    ])  # fmt: skip
    return prompt, json.dumps(dict(intent=intent, name=name, place=place, people=people, day=day, hour=hour))


def python(draw: random.Random) -> tuple[str, str]:
    """A description of a filter over a list, turned into a function of one comprehension."""
    verb, many, (say, change) = _one(draw, VERBS), _one(draw, LISTS), _pair(draw, CHANGES)
    one, number, letter = many[:-1], draw.randint(2, 30), draw.choice("abcdefghiklmnoprstuvwyz")
    rule, test = (text.format(x=one, n=number, c=letter) for text in _pair(draw, TESTS))
    prompt = draw.choice([
        f"write a python function {verb}_{many} that returns every {one} that {rule}, {say}.",
        f"python: given {many}, if a {one} {rule} then include it {say}. name it {verb}_{many}.",
        f"define {verb}_{many}. it takes a list of {many} and gives back, {say}, each {one} which {rule}.",
    ])  # fmt: skip
    return prompt, f"def {verb}_{many}({many}):\n    return [{change.format(one)} for {one} in {many} if {test}]"


def german(draw: random.Random) -> tuple[str, str]:
    """An English sentence in German (umlauts spelled out): genders, endings and the verb in second place."""
    (who, person), (does, tut), (what, thing) = _pair(draw, PEOPLE), _pair(draw, ACTIONS), _pair(draw, THINGS)
    (when, wann), (where, wo) = _pair(draw, WHEN), _pair(draw, WHERE)
    (look, ist), (kind, art) = (word.split(": ") for word in _two(draw, ADJECTIVES))
    sentence = f"{when} the {look} {who} {does} a {kind} {what} {where}."
    prompt = draw.choice((f"in german: {sentence}", f"{sentence} translate it to german", f"auf deutsch: {sentence}"))
    (der, mann), (einen, apfel) = person.split(), thing.split()
    return prompt, f"{wann} {tut} {der} {ist}e {mann} {einen} {art}{ENDINGS[einen]} {apfel} {wo}."


def dates(draw: random.Random) -> tuple[str, str]:
    """A parcel's way, told in loose words and rewritten with ISO dates and grams."""
    (start, end), month, year = _two(draw, PORTS), draw.randrange(12), draw.randint(1990, 2029)
    left, weight = draw.randint(1, 19), draw.randint(2, 40)
    came = left + draw.randint(1, 9)
    prompt = draw.choice([
        f"log a {weight} kg parcel: left {start} on {left} {MONTHS[month]} {year} and reached {end} on the {came}.",
        f"iso dates and grams please: {start} to {end}, {MONTHS[month]} {left} to {came}, {year}, {weight} kg",
        f"normalise: sent from {start} {MONTHS[month]} {left} {year}; got to {end} on day {came}; weight {weight} kg",
    ])  # fmt: skip
    stamp = f"{year}-{month + 1:02}"
    return prompt, f"sent: {stamp}-{left:02} {start} | received: {stamp}-{came:02} {end} | load: {weight}000 g"


def restaurant(draw: random.Random) -> tuple[str, str]:
    """A row of a restaurant table, its fields in any order, described in two sentences."""
    name, stars, children = f"{_one(draw, COLOURS)} {_one(draw, SIGNS)}", draw.randint(1, 5), draw.choice(("yes", "no"))
    food, area, near, price = (_one(draw, pool) for pool in (FOODS, AREAS, SIGHTS, PRICES))
    table = dict(name=name, food=food, area=area, near=near, price=price, stars=stars, children=children)
    fields = ", ".join(f"{field}: {table[field]}" for field in draw.sample(list(table), len(table)))
    prompt = draw.choice(("describe this restaurant. ", "put it into words: ", "data to text: ")) + fields
    welcome = "families are welcome" if children == "yes" else "it is for adults only"
    place = f"the {name} serves {price} {food} food in the {area} area, close to the {near}."
    return prompt, f"{place} {welcome} and guests rate it {stars} of 5 stars."


def spelling(draw: random.Random) -> tuple[str, str]:
    """The text of a cheque: an amount of up to six digits in words."""
    number, coin, (payer, payee) = draw.randint(1_001, 999_999), _one(draw, MONEY), _two(draw, NAMES)
    prompt = draw.choice([
        f"write a cheque over {number} {coin} from {payer} to {payee}, the amount in words.",
        f"{payer} owes {payee} {number} {coin}. spell out the cheque.",
        f"cheque for {payee}: {number} {coin}, signed {payer}. use words, no digits",
    ])  # fmt: skip
    return prompt, f"pay {payee} the sum of {_words(number)} {coin}, signed by {payer}"


FAMILIES: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "arithmetic": arithmetic, "sql": sql, "slots": slots, "python": python,
    "german": german, "dates": dates, "restaurant": restaurant, "spelling": spelling,
}  # fmt: skip


def _split(response: str) -> str:
    return "eval" if crc32(response.encode()) % 10 == 0 else "train"


def _one(draw: random.Random, pool: str) -> str:
    return draw.choice(pool.split(", "))


def _two(draw: random.Random, pool: str) -> list[str]:
    return draw.sample(pool.split(", "), 2)


def _pair(draw: random.Random, pool: str) -> list[str]:
    return _one(draw, pool).split(": ")


def _words(number: int) -> str:
    """Spells a whole number below a million, in the British way."""
    for size, name in ((1000, "thousand"), (100, "hundred")):
        if number >= size:
            rest = number % size
            joint = "" if rest == 0 else f" and {_words(rest)}" if rest < 100 else f" {_words(rest)}"
            return f"{_words(number // size)} {name}{joint}"
    return ONES[number] if number < 20 else TENS[number // 10] + (f" {ONES[number % 10]}" if number % 10 else "")


if __name__ == "__main__":
    command_line(Log, run)
