"""Word pools and the basic grammar for templates: articles, lists, slots filled from pools.

This module holds vocabulary only; the families define the sentences.
"""

import re
from collections.abc import Mapping, Sequence
from string import Formatter

from cora_cli.data.builtin.build import Dice

NAMES = (
    "Amara", "Anton", "Aisha", "Bruno", "Carla", "Chen", "Daniel", "Dalia", "Elena", "Emil", "Farah", "Felix", "Grace",
    "Hugo", "Ines", "Ivan", "Jonas", "Julia", "Kofi", "Leila", "Luca", "Maya", "Mateo", "Nadia", "Noah", "Nora", "Omar",
    "Olga", "Pablo", "Priya", "Quentin", "Rosa", "Rafael", "Sara", "Samir", "Tara", "Theo", "Uma", "Victor", "Wen", "Yara",
    "Zoe",
)  # fmt: skip
SURNAMES = (
    "Adler", "Bennett", "Castro", "Dubois", "Evans", "Fischer", "Garcia", "Haddad", "Ito", "Jensen", "Kowalski", "Lindgren",
    "Moreau", "Novak", "Okafor", "Patel", "Quinn", "Rossi", "Silva", "Tanaka", "Usman", "Vargas", "Weber", "Young", "Zhang",
)  # fmt: skip
TOWNS = (
    "Ashford", "Bergen", "Brighton", "Cork", "Dresden", "Girona", "Halifax", "Kandy", "Leeds", "Lyon", "Malmo", "Mendoza",
    "Nantes", "Oakville", "Perth", "Porto", "Riverton", "Salzburg", "Tampere", "Trieste", "Utrecht", "Valencia",
)  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December",
)  # fmt: skip
FRUITS = (
    "apple", "apricot", "banana", "cherry", "fig", "grape", "kiwi", "lemon", "mango", "melon", "orange", "peach", "pear",
    "plum",
)  # fmt: skip
ANIMALS = (
    "badger", "camel", "deer", "eagle", "falcon", "goat", "hamster", "jaguar", "lizard", "otter", "rabbit", "seal", "tiger",
    "wolf",
)  # fmt: skip
TOOLS = (
    "axe", "chisel", "drill", "file", "hammer", "ladder", "pliers", "rake", "saw", "screwdriver", "shovel", "spanner",
    "trowel", "vice",
)  # fmt: skip
COLOURS = (
    "amber", "black", "blue", "brown", "crimson", "green", "grey", "indigo", "orange", "pink", "purple", "red", "violet",
    "white",
)  # fmt: skip
CLOTHES = (
    "belt", "boots", "cap", "coat", "dress", "gloves", "hat", "jacket", "jumper", "scarf", "shirt", "skirt", "socks",
    "trousers",
)  # fmt: skip
INSTRUMENTS = (
    "banjo", "cello", "clarinet", "drum", "flute", "guitar", "harp", "oboe", "organ", "piano", "trumpet", "tuba", "viola",
    "violin",
)  # fmt: skip
VEHICLES = (
    "bicycle", "bus", "canoe", "ferry", "helicopter", "lorry", "motorbike", "sailboat", "scooter", "taxi", "train", "tram",
    "truck", "van",
)  # fmt: skip
CATEGORIES: Mapping[str, tuple[str, ...]] = {
    "fruits": FRUITS, "animals": ANIMALS, "tools": TOOLS, "colours": COLOURS,
    "clothes": CLOTHES, "musical instruments": INSTRUMENTS, "vehicles": VEHICLES,
}  # fmt: skip
GOODS = (
    "backpack", "blender", "bookshelf", "camera", "coffee grinder", "desk lamp", "electric kettle", "garden chair", "headset",
    "keyboard", "monitor", "pillow", "office chair", "frying pan", "phone case", "printer", "rain jacket", "raincoat", "router",
    "smart lock", "speaker", "suitcase", "tablet", "tent", "toaster", "umbrella", "vacuum cleaner", "wallet", "water bottle", "webcam",
)  # fmt: skip

Pools = dict[str, Sequence[object]]

POOLS: Pools = {
    "name": NAMES,
    "surname": SURNAMES,
    "town": TOWNS,
    "day": DAYS,
    "workday": DAYS[:5],
    "month": MONTHS,
    "date": range(1, 29),
    "good": GOODS,
    "few": range(3, 10),
    "some": range(11, 30),
    "many": range(31, 99),
    "hundreds": range(120, 980, 10),
    "year": range(1998, 2025),
    "hour": [f"{hour}:{minute}" for hour in range(8, 20) for minute in ("00", "15", "30", "45")],
    "order": [f"{letter}{number}" for letter in "ABKRT" for number in range(1040, 9990, 37)],
}

_VOWEL_SOUND = re.compile(r"\b([Aa]) (?=(?!uni|use|usa|one\b|eu)[aeiou]|hour|honest|8\b|8\d|11\b|18\b)", re.IGNORECASE)


def articles(text: str) -> str:
    """Turn "a" into "an" before a vowel sound."""
    return _VOWEL_SOUND.sub(r"\1n ", text)


def listing(items: Sequence[str], last: str = "and") -> str:
    """Join as in a sentence: "a, b and c"."""
    return f" {last} ".join(part for part in (", ".join(items[:-1]), items[-1]) if part)


def counted(count: int, singular: str, plural: str = "") -> str:
    """A count with its noun: "1 pear", "3 pears"."""
    return f"{count} {singular if count == 1 else plural or singular + 's'}"


def capital(text: str) -> str:
    """`text` with its first letter in upper case and the rest untouched."""
    return text[:1].upper() + text[1:]


def fill(dice: Dice, templates: Sequence[str], pools: Mapping[str, Sequence[object]] = POOLS) -> list[str]:
    """Fill `{slot}`s of all templates with one consistent draw, then set the articles.

    A slot takes its pool's name, with a digit where several different values of a pool are needed (`{name}`, `{name2}`).
    """
    slots = dict.fromkeys(slot for template in templates for _, slot, _, _ in Formatter().parse(template) if slot)
    by_pool: dict[str, list[str]] = {}
    for slot in slots:
        by_pool.setdefault(slot.rstrip("0123456789"), []).append(slot)
    values: dict[str, object] = {}
    for pool, names in by_pool.items():
        values.update(zip(names, dice.sample(pools[pool], len(names)), strict=True))
    return [articles(template.format_map(values)) for template in templates]
