"""Questions with a number for an answer, worked in short steps: word problems, units, percentages, statistics, clock times.

All amounts divide without a remainder, so no answer is rounded.
"""

from cora_cli.data.builtin.build import Dice, Draft
from cora_cli.data.builtin.words import FRUITS, GOODS, NAMES, TOWNS, articles, counted, listing

PACKED = ("pencils", "tiles", "eggs", "stickers", "screws", "cups", "candles", "batteries")


def _shopping(dice: Dice) -> tuple[str, str]:
    name, (first, second) = dice.choice(NAMES), dice.sample(GOODS, 2)
    count, other, price, cost = dice.between(2, 9), dice.between(2, 6), dice.between(3, 40), dice.between(2, 60)
    total = count * price + other * cost
    question = f"{name} buys {count} {first}s at ${price} each and {other} {second}s at ${cost} each. How much does {name} pay in total?"
    return question, (
        f"The {first}s cost {count} × ${price} = ${count * price}. The {second}s cost {other} × ${cost} = ${other * cost}. "
        f"Together that is ${count * price} + ${other * cost} = ${total}."
    )


def _change(dice: Dice) -> tuple[str, str]:
    name, item = dice.choice(NAMES), dice.choice(FRUITS)
    count, cents = dice.between(3, 12), dice.between(2, 9) * 10
    paid = (count * cents // 100 + dice.between(1, 4)) * 100
    rest = paid - count * cents
    plural = "cherries" if item == "cherry" else "peaches" if item == "peach" else "mangoes" if item == "mango" else item + "s"
    return (
        f"{name} buys {count} {plural} for {cents} cents each and pays with ${paid // 100}. How much change does {name} get?",
        f"{count} {plural} cost {count} × {cents} = {count * cents} cents, which is ${count * cents / 100:.2f}. "
        f"The change is ${paid // 100}.00 - ${count * cents / 100:.2f} = ${rest / 100:.2f}.",
    )


def _journey(dice: Dice) -> tuple[str, str]:
    vehicle, (start, end) = dice.choice(("train", "bus", "lorry", "cyclist", "car")), dice.sample(TOWNS, 2)
    speed, hours = (dice.between(12, 24) if vehicle == "cyclist" else dice.between(8, 24) * 5), dice.between(2, 7)
    distance = speed * hours
    if dice.chance(0.5):
        return (
            f"A {vehicle} travels from {start} to {end} at {speed} km/h and needs {hours} hours. How far apart are the two towns?",
            f"Distance is speed times time: {speed} km/h × {hours} h = {distance} km. The towns are {distance} km apart.",
        )
    return (
        f"The road from {start} to {end} is {distance} km long. How long does a {vehicle} take at {speed} km/h?",
        f"Time is distance divided by speed: {distance} km ÷ {speed} km/h = {hours} hours.",
    )


def _sharing(dice: Dice) -> tuple[str, str]:
    name, item = dice.choice(NAMES), dice.choice(PACKED)
    size, boxes, rest = dice.between(4, 12), dice.between(5, 20), dice.between(1, 3)
    total = size * boxes + rest
    return (
        f"{name} packs {total} {item} into boxes of {size}. How many boxes are full, and how many {item} are left over?",
        f"{total} ÷ {size} = {boxes} with a remainder of {rest}, because {boxes} × {size} = {boxes * size}. "
        f"So {boxes} boxes are full and {rest} {'is' if rest == 1 else 'are'} left over.",
    )


def _savings(dice: Dice) -> tuple[str, str]:
    name, item = dice.choice(NAMES), dice.choice(GOODS)
    weekly, weeks = dice.between(4, 25), dice.between(3, 15)
    have = dice.between(5, 60)
    goal = have + weekly * weeks
    return (
        articles(
            f"{name} wants to buy a {item} for ${goal}, has ${have} and saves ${weekly} a week. After how many weeks is it enough?"
        ),
        f"Still missing: ${goal} - ${have} = ${goal - have}. At ${weekly} a week this takes {goal - have} ÷ {weekly} = {weeks} weeks.",
    )


def _work(dice: Dice) -> tuple[str, str]:
    name, rate, hours, extra = dice.choice(NAMES), dice.between(11, 32), dice.between(20, 40), dice.between(2, 8)
    bonus = dice.between(2, 6)
    regular, overtime = rate * hours, (rate + bonus) * extra
    return (
        f"{name} earns ${rate} an hour and ${bonus} more for each hour of overtime. This week it was {hours} normal hours and "
        f"{extra} hours of overtime. What is the pay for the week?",
        f"Normal hours: {hours} × ${rate} = ${regular}. Overtime pays ${rate} + ${bonus} = ${rate + bonus} an hour, so "
        f"{extra} × ${rate + bonus} = ${overtime}. The pay is ${regular} + ${overtime} = ${regular + overtime}.",
    )


def _ages(dice: Dice) -> tuple[str, str]:
    (older, younger), age, gap, years = dice.sample(NAMES, 2), dice.between(6, 30), dice.between(2, 15), dice.between(2, 12)
    return (
        f"{older} is {gap} years older than {younger}, who is {age}. How old will both be together in {years} years?",
        f"{older} is {age} + {gap} = {age + gap} now. In {years} years {younger} is {age + years} and {older} is {age + gap + years}. "
        f"Together that is {2 * (age + years) + gap} years.",
    )


def _garden(dice: Dice) -> tuple[str, str]:
    name, width, length, cost = dice.choice(NAMES), dice.between(4, 18), dice.between(6, 25), dice.between(3, 15)
    around = 2 * (width + length)
    return (
        f"{name} puts a fence around a garden that is {length} m long and {width} m wide. A metre of fence costs ${cost}. "
        "What are the area of the garden and the price of the fence?",
        f"The area is {length} × {width} = {length * width} square metres. The fence is 2 × ({length} + {width}) = {around} m long "
        f"and costs {around} × ${cost} = ${around * cost}.",
    )


PROBLEMS = (_shopping, _change, _journey, _sharing, _savings, _work, _ages, _garden)


def word_problem(dice: Dice) -> Draft:
    """A small story with a calculation, answered with its steps."""
    question, answer = dice.choice(PROBLEMS)(dice)
    lead = dice.choice(
        ("", "", "Solve this problem step by step.", "Work out the answer and show the calculation.", "Answer briefly.")
    )
    return Draft(lead, answer, question) if lead else Draft(question, answer)


# (from, to, factor, what); the factors are exact by definition.
UNITS = (
    ("kilometres", "metres", 1000, "kilometre"), ("metres", "centimetres", 100, "metre"), ("hours", "minutes", 60, "hour"),
    ("minutes", "seconds", 60, "minute"), ("days", "hours", 24, "day"), ("weeks", "days", 7, "week"), ("kilograms", "grams", 1000, "kilogram"),
    ("litres", "millilitres", 1000, "litre"), ("feet", "inches", 12, "foot"), ("yards", "feet", 3, "yard"), ("tonnes", "kilograms", 1000, "tonne"),
    ("gallons", "pints", 8, "gallon"), ("centimetres", "millimetres", 10, "centimetre"), ("pounds", "ounces", 16, "pound"),
)  # fmt: skip


def convert_units(dice: Dice) -> Draft:
    """One unit into another, both ways, with an exact factor; or Celsius and Fahrenheit."""
    if dice.chance(0.2):
        celsius = 5 * dice.between(-8, 40)
        fahrenheit = celsius * 9 // 5 + 32
        if dice.chance(0.5):
            return Draft(
                dice.choice(("Convert {} °C to Fahrenheit.", "What is {} degrees Celsius in Fahrenheit?")).format(celsius),
                f"Multiply by 9/5 and add 32: {celsius} × 9/5 = {celsius * 9 // 5}, and {celsius * 9 // 5} + 32 = {fahrenheit}. "
                f"So {celsius} °C is {fahrenheit} °F.",
            )
        return Draft(
            dice.choice(("Convert {} °F to Celsius.", "What is {} degrees Fahrenheit in Celsius?")).format(fahrenheit),
            f"Subtract 32 and multiply by 5/9: {fahrenheit} - 32 = {fahrenheit - 32}, and {fahrenheit - 32} × 5/9 = {celsius}. "
            f"So {fahrenheit} °F is {celsius} °C.",
        )
    large, small, factor, one = dice.choice(UNITS)
    amount = dice.between(2, 60)
    if dice.chance(0.5):
        ask, answer = (
            (amount, large, small),
            f"One {one} is {factor} {small}, so {amount} {large} are {amount} × {factor} = {amount * factor} {small}.",
        )
    else:
        total = amount * factor
        ask, answer = (
            (total, small, large),
            f"One {one} is {factor} {small}, so {total} {small} are {total} ÷ {factor} = {amount} {large}.",
        )
    question = dice.choice(("Convert {} {} to {}.", "How many {2} are {0} {1}?", "Express {} {} in {}."))
    return Draft(question.format(*ask), answer)


def percentage(dice: Dice) -> Draft:
    """A discount, a tip, a rise or a share, in integer per cent and dollars."""
    percent, price = 5 * dice.between(1, 15), 20 * dice.between(1, 20)
    part, item, name = percent * price // 100, dice.choice(GOODS), dice.choice(NAMES)
    rate = dice.choice((5, 10, 15, 20))
    tip = rate * price // 100
    question, answer = dice.choice((
        (f"A {item} costs ${price} and is reduced by {percent} %. What is the new price?",
         f"{percent} % of ${price} is ${part}. The new price is ${price} - ${part} = ${price - part}."),
        (f"The bill at a restaurant is ${price} and {name} adds a tip of {rate} %. How much is paid in all?",
         f"The tip is {rate} % of ${price}, which is ${tip}. In all, ${price} + ${tip} = ${price + tip} is paid."),
        (f"The price of a {item} was ${price} and rises by {percent} %. What is it afterwards?",
         f"The rise is {percent} % of ${price}, that is ${part}. Afterwards the price is ${price + part}."),
        (f"Of {price} people who were asked, {part} like the new {item}. What percentage is that?",
         f"{part} ÷ {price} = {percent / 100:.2f}, which is {percent} %."),
        (f"What is {percent} % of {price}?", f"{percent} % of {price} is {price} × {percent} ÷ 100 = {part}."),
    ))  # fmt: skip
    return Draft(articles(question), articles(answer))


def sequence(dice: Dice) -> Draft:
    """The next two terms of a sequence and its rule."""
    start, step, kind = dice.between(1, 30), dice.between(2, 12), dice.below(4)
    if kind == 0:
        terms, rule = [start + step * i for i in range(7)], f"Each number is {step} more than the one before"
    elif kind == 1:
        terms, rule = [start + 100 - step * i for i in range(7)], f"Each number is {step} less than the one before"
    elif kind == 2:
        ratio, first = dice.between(2, 4), dice.between(1, 9)
        terms, rule = [first * ratio**i for i in range(7)], f"Each number is {ratio} times the one before"
    else:
        terms = [start, start + step]
        while len(terms) < 7:
            terms.append(terms[-1] + terms[-2])
        rule = "Each number is the sum of the two before it"
    shown = ", ".join(map(str, terms[:5]))
    question = dice.choice((
        "Which two numbers come next: {}, ...?", "Continue the sequence {} with two more numbers and name the rule.",
        "Find the pattern and the next two terms: {}.",
    ))  # fmt: skip
    return Draft(question.format(shown), f"{rule}. The next two numbers are {terms[5]} and {terms[6]}.", group=shown)


def statistics(dice: Dice) -> Draft:
    """Mean, median, range, largest or smallest of a short list with a story."""
    count = dice.choice((3, 5, 7))
    values = dice.numbers(count - 1, 4, 60)
    values.append((-sum(values)) % count + count * dice.between(1, 8))  # makes the mean an integer
    values = dice.shuffled(values)
    what = dice.choice(
        ("daily visitors", "test scores", "daily minutes of reading", "daily sales of a shop", "goals in past seasons")
    )
    ordered, shown = sorted(values), ", ".join(map(str, values))
    name, answer = dice.choice((
        ("mean", f"The sum is {' + '.join(map(str, values))} = {sum(values)}. Divided by {count}, the mean is {sum(values) // count}."),
        ("median", f"In order: {', '.join(map(str, ordered))}. The middle value, and so the median, is {ordered[count // 2]}."),
        ("range", f"The largest value is {ordered[-1]} and the smallest is {ordered[0]}, so the range is {ordered[-1] - ordered[0]}."),
        ("sum", f"{' + '.join(map(str, values))} = {sum(values)}."),
    ))  # fmt: skip
    question = dice.choice(
        (
            "Calculate the {name} of these {what}.",
            "Here are some {what}. What is the {name}?",
            "What is the {name} of these {what}?",
        )
    )
    return Draft(question.format(name=name, what=what), answer, shown)


def clock(dice: Dice) -> Draft:
    """When something ends, or how long it lasts."""
    hours, minutes, length = dice.between(7, 19), 5 * dice.below(12), 5 * dice.between(5, 45)
    end = hours * 60 + minutes + length
    start_text, end_text = f"{hours}:{minutes:02d}", f"{end // 60}:{end % 60:02d}"
    parts = [counted(length // 60, "hour")] * (length >= 60) + [counted(length % 60, "minute")] * (length % 60 > 0)
    long = listing(parts)
    thing = dice.choice(("film", "meeting", "train ride", "concert", "workshop", "football match", "lesson", "flight", "exam"))
    question, answer = dice.choice((
        (f"The {thing} starts at {start_text} and lasts {long}. When does it end?",
         f"{long} after {start_text} is {end_text}, so the {thing} ends at {end_text}."),
        (f"The {thing} lasts from {start_text} to {end_text}. How long is that?", f"From {start_text} to {end_text} it is {long}."),
        (f"The {thing} must end at {end_text} and takes {long}. At what time should it begin?",
         f"{long} before {end_text} is {start_text}, so the {thing} should begin at {start_text}."),
    ))  # fmt: skip
    return Draft(question, answer)


FAMILIES = (word_problem, convert_units, percentage, sequence, statistics, clock)
