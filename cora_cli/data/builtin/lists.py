"""Work on structured text: sorting, filtering and grouping lists, reading small tables, writing JSON, changing date formats.

Every answer is computed from the values in the prompt.
"""

import calendar
import json

from cora_cli.data.builtin.build import Dice, Draft
from cora_cli.data.builtin.words import (
    CATEGORIES,
    DAYS,
    GOODS,
    MONTHS,
    NAMES,
    SURNAMES,
    TOWNS,
    articles,
    capital,
    counted,
    listing,
)

WORDS = tuple(word for pool in (*CATEGORIES.values(), GOODS) for word in pool if " " not in word)


def sort_items(dice: Dice) -> Draft:
    """A list in another order."""
    if dice.chance(0.35):
        numbers = dice.sample(range(3, 400), dice.between(5, 8))
        text, down = ", ".join(map(str, numbers)), dice.chance(0.5)
        order = "from largest to smallest" if down else "from smallest to largest"
        question = dice.choice(("Sort these numbers {}.", "Put the numbers in order {}.", "Arrange the following numbers {}."))
        return Draft(question.format(order), ", ".join(map(str, sorted(numbers, reverse=down))), text)
    words = dice.sample(sorted(set(dice.choice((WORDS, NAMES, TOWNS)))), dice.between(5, 8))
    order, result = dice.choice((
        ("in alphabetical order", sorted(words)),
        ("in reverse alphabetical order", sorted(words, reverse=True)),
        ("from shortest to longest, and alphabetically where the length is the same", sorted(words, key=lambda word: (len(word), word))),
        ("by their last letter, and alphabetically where it is the same", sorted(words, key=lambda word: (word[-1], word))),
    ))  # fmt: skip
    question = dice.choice(
        ("Sort the list {}.", "Write these words {}.", "Arrange the following words {}.", "List the words below {}.")
    )
    if dice.chance(0.4):
        return Draft(question.format(order), "\n".join(f"{n}. {word}" for n, word in enumerate(result, 1)), "\n".join(words))
    return Draft(question.format(order), ", ".join(result), ", ".join(words))


def filter_items(dice: Dice) -> Draft:
    """The part of a list that meets a condition, with its count."""
    words = dice.sample(sorted(set(WORDS)), dice.between(7, 10))
    letter, length = dice.choice([word[0] for word in words]), dice.choice([len(word) for word in words])
    inside = dice.choice("aeiou")
    condition, kept = dice.choice((
        (f"start with the letter {letter}", [word for word in words if word.startswith(letter)]),
        (f"have exactly {length} letters", [word for word in words if len(word) == length]),
        (f"have more than {length - 1} letters", [word for word in words if len(word) > length - 1]),
        (f"do not contain the letter {inside}", [word for word in words if inside not in word]),
        (f"contain the letter {inside}", [word for word in words if inside in word]),
    ))  # fmt: skip
    question = dice.choice((
        "Which of these words {}?", "List only the words that {}.", "Keep the words that {} and say how many there are.",
    ))  # fmt: skip
    if not kept:
        answer = "None of the words meets the condition."
    elif question.startswith("Keep"):
        answer = f"{', '.join(kept)} ({counted(len(kept), 'word')})"
    else:
        answer = ", ".join(kept)
    return Draft(question.format(condition), answer, ", ".join(words))


def group_items(dice: Dice) -> Draft:
    """A mixed list sorted into categories, or the odd one out."""
    first, second = dice.sample(list(CATEGORIES), 2)
    shared = set(CATEGORIES[first]) & set(CATEGORIES[second])  # an orange is a fruit and a colour
    if dice.chance(0.4):
        members = dice.sample([item for item in CATEGORIES[first] if item not in shared], dice.between(3, 4))
        stranger = dice.choice([item for item in CATEGORIES[second] if item not in shared])
        question = dice.choice(
            ("Which word does not belong to the others, and why?", "Find the odd one out and explain your choice.")
        )
        answer = f"The odd one out is {stranger}. {capital(listing(members))} are {first}, while the word {stranger} belongs with the {second}."
        return Draft(question, answer, ", ".join(dice.shuffled([*members, stranger])))
    items = [
        dice.sample([item for item in CATEGORIES[name] if item not in shared], dice.between(2, 4)) for name in (first, second)
    ]
    question = dice.choice(
        ("Sort these words into two groups: {} and {}.", "Divide the list into {} and {}.", "Group the words: {} or {}?")
    )
    mixed = dice.shuffled([*items[0], *items[1]])
    answer = "\n".join(
        f"{capital(name)}: {', '.join(item for item in mixed if item in group)}"
        for name, group in zip((first, second), items, strict=True)
    )
    return Draft(question.format(first, second), answer, ", ".join(mixed))


def read_table(dice: Dice) -> Draft:
    """A question about a small table in CSV form."""
    head, names, low, high = dice.choice((
        ("town,visitors", TOWNS, 120, 990), ("player,points", NAMES, 3, 60), ("product,price", GOODS, 5, 250), ("town,rain_mm", TOWNS, 2, 95),
        ("seller,sales", NAMES, 10, 400),
    ))  # fmt: skip
    keys, values = dice.sample(names, dice.between(4, 6)), dice.sample(range(low, high), 6)
    rows = list(zip(keys, values, strict=False))
    key, value = head.split(",")
    best, worst = max(rows, key=lambda row: row[1]), min(rows, key=lambda row: row[1])
    limit = dice.choice(values[:3])
    above = [name for name, number in rows if number > limit]
    ranking = sorted(rows, key=lambda row: -row[1])
    question, answer = dice.choice((
        (f"Which {key} has the highest {value}?", f"{capital(best[0])} has the highest {value} with {best[1]}."),
        (f"Which {key} has the lowest {value}?", f"{capital(worst[0])} has the lowest {value} with {worst[1]}."),
        (f"How far apart are the highest and the lowest {value}?",
         f"The highest is {best[1]} ({best[0]}) and the lowest {worst[1]} ({worst[0]}); the difference is {best[1] - worst[1]}."),
        (f"List every {key} with {value} above {limit}.", ", ".join(above) if above else f"No {key} is above {limit}."),
        (f"Name the first three by {value}, highest first.", "\n".join(f"{i}. {name} ({n})" for i, (name, n) in enumerate(ranking[:3], 1))),
        (f"What is the total of {value}?", f"{' + '.join(str(n) for _, n in rows)} = {sum(n for _, n in rows)}."),
    ))  # fmt: skip
    return Draft(f"Look at the table. {question}", answer, "\n".join([head, *(f"{name},{number}" for name, number in rows)]))


def convert_list(dice: Dice) -> Draft:
    """The same entries in another notation: bullets, a Markdown table, JSON, a sentence."""
    people, towns, ages = dice.sample(NAMES, 3), dice.sample(TOWNS, 3), dice.numbers(3, 19, 70)
    rows = list(zip(people, ages, towns, strict=True))[: dice.between(2, 3)]
    notations = {
        "CSV lines with a header": "\n".join(["name,age,town", *(f"{n},{a},{t}" for n, a, t in rows)]),
        "a Markdown table": "\n".join(
            ["| name | age | town |", "|---|---|---|", *(f"| {n} | {a} | {t} |" for n, a, t in rows)]
        ),
        "a JSON array of objects": json.dumps([{"name": n, "age": a, "town": t} for n, a, t in rows]),
        "a bulleted list": "\n".join(f"- {n} ({a}), {t}" for n, a, t in rows),
        "full sentences": " ".join(f"{n} is {a} years old and lives in {t}." for n, a, t in rows),
    }
    source, target = dice.sample(list(notations), 2)
    question = dice.choice(("Turn this into {}.", "Rewrite the data as {}.", "Convert the following to {}."))
    return Draft(question.format(target), notations[target], notations[source])


def _weekday(year: int, month: int, day: int) -> str:
    return DAYS[calendar.weekday(year, month, day)]


def _ordinal(day: int) -> str:
    return f"{day}{'th' if 10 < day < 14 else {1: 'st', 2: 'nd', 3: 'rd'}.get(day % 10, 'th')}"


def convert_date(dice: Dice) -> Draft:
    """A date in another format, its weekday, or a date some days away."""
    year, month = dice.between(1990, 2029), dice.between(1, 12)
    day = dice.between(1, 28)
    name = MONTHS[month - 1]
    formats = {
        "ISO format (YYYY-MM-DD)": f"{year}-{month:02d}-{day:02d}",
        "the format DD/MM/YYYY": f"{day:02d}/{month:02d}/{year}",
        "the format MM/DD/YYYY": f"{month:02d}/{day:02d}/{year}",
        "words, with the month's name first": f"{name} {day}, {year}",
        "words, with the day first": f"{day} {name} {year}",
    }
    iso = formats["ISO format (YYYY-MM-DD)"]
    if dice.chance(0.65):
        source, target = dice.sample(list(formats), 2)
        given = formats[source] + (f" ({source[11:]})" if source.startswith("the format") else "")
        question = dice.choice(("Write the date {} in {}.", "Convert {} to {}.", "Change this date, {}, into {}."))
        return Draft(question.format(given, target), formats[target], group=iso)
    length = calendar.monthrange(year, month)[1]
    if dice.chance(0.4):
        leap = f", because {year} is {'a' if calendar.isleap(year) else 'not a'} leap year" if month == 2 else ""
        asks = ("How many days does {} {} have?", "How long is the month of {} {} in days?")
        return Draft(dice.choice(asks).format(name, year), f"{name} {year} has {length} days{leap}.", group=f"{name} {year}")
    step = dice.between(1, 30)
    later = (year, month, day + step) if day + step <= length else (year + month // 12, month % 12 + 1, day + step - length)
    if later[2] > calendar.monthrange(later[0], later[1])[1]:  # 30 days after 30 January is past the end of February
        later = (later[0], later[1] + 1, later[2] - calendar.monthrange(later[0], later[1])[1])
    start = f"{_weekday(year, month, day)}, {day} {name} {year}"
    return Draft(
        f"Which date is {counted(step, 'day')} after {start}?",
        f"{counted(step, 'day')} after {start} is {_weekday(*later)}, the {_ordinal(later[2])} of {MONTHS[later[1] - 1]} {later[0]}.",
    )


def extract_json(dice: Dice) -> Draft:
    """Fields of a sentence as a JSON object."""
    name, surname, town, good, count = (dice.choice(pool) for pool in (NAMES, SURNAMES, TOWNS, GOODS, range(2, 30)))
    price, day, hour, age = dice.between(5, 300), dice.choice(DAYS), dice.between(8, 19), dice.between(19, 70)
    job = dice.choice(
        ("nurse", "plumber", "teacher", "chemist", "translator", "gardener", "pilot", "baker", "accountant", "dentist")
    )
    email = f"{name}.{surname}@{dice.choice(('example.com', 'example.org', 'mail.example'))}".lower()
    text, fields = dice.choice((
        (f"{name} {surname}, {age}, works as a {job} in {town} and can be reached at {email}.",
         {"name": f"{name} {surname}", "age": age, "job": job, "town": town, "email": email}),
        (f"Please send {count} {good}s to {name} {surname} in {town}; the agreed price is ${price} each.",
         {"customer": f"{name} {surname}", "town": town, "product": good, "quantity": count, "unit_price": price}),
        (f"The meeting with {name} {surname} was moved to {day} at {hour}:30 and now takes place in {town}. Write to {email} with questions.",
         {"contact": f"{name} {surname}", "email": email, "day": day, "time": f"{hour}:30", "place": town}),
        (f"For sale: {good}, bought {dice.between(2, 9)} years ago, ${price}. Collect it in {town} on {day}. Ask for {name}.",
         {"item": good, "price": price, "town": town, "day": day, "seller": name}),
        (f"A {job} from {town}, {name} {surname} ({age}), won the first prize of ${price * 10}.",
         {"name": f"{name} {surname}", "age": age, "job": job, "town": town, "prize": price * 10}),
        (f"Hi, {name} here. I'd like to book a table for {count} on {day} at {hour}:30. My mail is {email}.",
         {"name": name, "guests": count, "day": day, "time": f"{hour}:30", "email": email}),
    ))  # fmt: skip
    wanted = dice.sample(list(fields), dice.between(3, 5))
    question = dice.choice((
        "Extract these fields as JSON: {}.", "Read the text and return a JSON object with the keys {}.",
        "Turn the text into JSON. Keys: {}.", "Fill a JSON object with {} from the message.",
    ))  # fmt: skip
    return Draft(question.format(", ".join(wanted)), json.dumps({key: fields[key] for key in wanted}), articles(text))


FAMILIES = (sort_items, filter_items, group_items, read_table, convert_list, convert_date, extract_json)
