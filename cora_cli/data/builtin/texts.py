"""Longer answers: a biography from notes, an advertisement, a reasoned choice, a plan for a day, a very short story.

They extend the range of answer lengths; short answers are in `writing` and `facts`.
"""

from cora_cli.data.builtin.build import Dice, Draft
from cora_cli.data.builtin.words import POOLS, Pools, capital, counted, fill

TEXT_POOLS: Pools = POOLS | {
    "job": ("nurse", "carpenter", "chemist", "pilot", "teacher", "translator", "gardener", "engineer", "baker", "photographer"),
    "hobby": ("sailing", "chess", "pottery", "hiking", "choir singing", "bird watching", "cooking", "astronomy", "cycling"),
    "dream": ("see the northern lights", "write a cookbook", "restore an old boat", "learn Japanese", "open a small museum", "cycle to the sea"),
    "early": range(1950, 1990),
    "animal": ("fox", "crow", "hedgehog", "goat", "mouse", "owl", "turtle", "donkey"),
    "place": ("an old mill", "a lighthouse", "a quiet harbour", "a snowy village", "a railway station", "an apple orchard"),
    "object": ("a rusty key", "a paper boat", "a silver whistle", "a torn map", "a blue umbrella", "a wooden box"),
    "feature": ("is light enough for every day", "is made from recycled material", "comes with a guarantee of {few} years", "is easy to clean",
                "is ready in seconds", "fits into small flats", "was tested by {hundreds} customers", "comes in {few} colours", "can be repaired"),
}  # fmt: skip


def biography(dice: Dice) -> Draft:
    """Notes about a person as a paragraph."""
    notes = [
        "name: {name} {surname}",
        "born: {early}, {town}",
        "job: {job}",
        "years in the job: {some}",
        "hobby: {hobby}",
        "dream: {dream}",
    ]
    sentences = dice.choice((
        ("{name} {surname} was born in {town} in {early}.", "After school {name} became a {job} and has worked as one for {some} years.",
         "In the evenings {hobby} offers a welcome change.", "One dream remains: to {dream}."),
        ("Born in {town} in {early}, {name} {surname} has been a {job} for {some} years.", "Colleagues know that {name} loves {hobby}.",
         "Asked about plans for the future, {name} says: I would like to {dream}."),
        ("{name} {surname} is a {job} with {some} years of experience.", "{name} comes from {town} and was born there in {early}.",
         "Free weekends belong to {hobby}, and one day {name} wants to {dream}."),
    ))  # fmt: skip
    given, text = fill(dice, ["\n".join(dice.shuffled(notes)), " ".join(sentences)], TEXT_POOLS)
    asks = (
        "Write a short biography from these notes.",
        "Turn the notes into a paragraph about this person.",
        "Use the notes to introduce this person in a few sentences.",
    )
    return Draft(dice.choice(asks), text, given)


def advertisement(dice: Dice) -> Draft:
    """A product's features as a short advertisement."""
    features = [str(feature) for feature in dice.sample(TEXT_POOLS["feature"], 3)]
    opening = dice.choice(
        (
            "Looking for a new {good}?",
            "Is your old {good} worn out?",
            "Treat yourself to a new {good}!",
            "Here is the {good} that you have been waiting for.",
        )
    )
    closing = dice.choice(
        (
            "Order it today for only ${many}.",
            "You get it for ${many}, while stocks last.",
            "Visit our shop in {town} and take it home for ${many}.",
        )
    )
    body = f"Ours {features[0]} and {features[1]}. What is more, it {features[2]}."
    notes = "\n".join(
        [
            "product: {good}",
            *(f"- {feature}" for feature in features),
            "price: ${many}",
            *(["shop: {town}"] if "{town}" in closing else []),
        ]
    )
    given, text = fill(dice, [notes, f"{opening} {body} {closing}"], TEXT_POOLS)
    asks = (
        "Write a short advertisement for this product.",
        "Turn these points into an advert of a few sentences.",
        "Advertise the product below in a friendly tone.",
    )
    return Draft(dice.choice(asks), text, given)


# The product, the quality to compare, its unit.
OFFERS = (
    ("phone", "battery life", "hours"), ("flat", "size", "square metres"), ("backpack", "volume", "litres"), ("torch", "range", "metres"),
    ("drill", "guarantee", "months"), ("camera", "memory", "gigabytes"), ("bicycle", "range", "kilometres"), ("rope", "length", "metres"),
)  # fmt: skip


def recommend(dice: Dice) -> Draft:
    """One of two offers, chosen by what the buyer cares about, with the difference in numbers."""
    thing, quality, unit = dice.choice(OFFERS)
    cheap, strong = 10 * dice.between(8, 40), dice.between(12, 60)
    more, extra = 10 * dice.between(1, 15), dice.between(2, 20)
    offers = dice.shuffled([("A", cheap, strong), ("B", cheap + more, strong + extra)])
    labels = dict(zip((offers[0][0], offers[1][0]), ("first", "second"), strict=True))
    given = "\n".join(f"{capital(labels[key])} {thing}: ${price}, {quality} {amount} {unit}" for key, price, amount in offers)
    budget = cheap + dice.between(1, more - 1)
    wish, winner, reason = dice.choice((
        ("wants to spend as little as possible", "A", f"it costs ${cheap} and so ${more} less than the other one"),
        (f"cares most about {quality}", "B", f"it has a {quality} of {strong + extra} {unit}, which is {extra} more than the other one"),
        (f"cannot spend more than ${budget}", "A", f"it costs ${cheap}, while the other one, at ${cheap + more}, is above the limit of ${budget}"),
        (f"needs a {quality} of at least {strong + 1} {unit}", "B", f"the other one reaches only {strong} {unit}, and this one has {strong + extra} {unit}"),
    ))  # fmt: skip
    drawback = (
        f"The drawback is its price, which is ${more} higher."
        if winner == "B"
        else f"The drawback is its {quality}, which is {extra} {unit} less."
    )
    (person,) = fill(dice, ["{name}"])
    if dice.chance(0.5):
        ask, answer = (
            "Recommend one of the offers: {} {}. Name a drawback of the {} too.",
            f"I recommend the {labels[winner]} {thing}",
        )
        return Draft(ask.format(person, wish, thing), f"{answer}, because {reason}. {drawback}", given)
    ask, answer = "{} {}. Which {} is the better choice, and why?", f"The {labels[winner]} {thing} is the better choice"
    return Draft(ask.format(person, wish, thing), f"{answer}, because {reason}.", given)


CHORES = (
    "answer e-mails", "call the bank", "clean the kitchen", "go for a run", "read a report", "repair the shelf", "shop for groceries",
    "study vocabulary", "tidy the desk", "walk the dog", "water the plants", "write a letter", "prepare lunch", "practise the piano",
)  # fmt: skip


def day_plan(dice: Dice) -> Draft:
    """Chores with their durations as a timetable without gaps."""
    chores, start = dice.sample(CHORES, dice.between(3, 5)), 60 * dice.between(7, 13) + 15 * dice.below(4)
    pause = dice.choice((0, 5, 10))
    lengths = [5 * dice.between(2, 15) for _ in chores]
    begin, lines = start, []
    for chore, length in zip(chores, lengths, strict=True):
        lines.append(f"{_clock(begin)}-{_clock(begin + length)} {capital(chore)}")
        begin += length + pause
    between = f", with a break of {pause} minutes after each task" if pause else ", without breaks"
    ask = dice.choice(
        (
            "Make a timetable in this order that begins at {}{}.",
            "Plan these tasks one after another from {} on{}.",
            "I start at {}. Write my schedule{}.",
        )
    )
    given = "\n".join(f"- {chore} ({counted(length, 'minute')})" for chore, length in zip(chores, lengths, strict=True))
    return Draft(ask.format(_clock(start), between), "\n".join(lines), given)


def _clock(minutes: int) -> str:
    return f"{minutes // 60:02d}:{minutes % 60:02d}"


# Sentences of a story, each with its alternatives.
STORY = (
    ("Near {place} lived {animal} named {name}.", "There was once {animal} called {name}, who lived near {place}.", "{name} was {animal} and kept watch over {place}."),
    ("One {weather} morning {name} found {object}.", "One evening, on the way home, {name} stumbled over {object}.", "On a {weather} {day}, somebody had left {object} at the door."),
    ("Nobody knew whose it was, so {name} asked all the neighbours.", "At first {name} wanted to keep it, but then began to wonder who missed it.",
     "{name} hid it under the leaves and waited for its owner."),
    ("After {few} days {second} came by and began to cry with joy.", "In the end it turned out to belong to {second}, who had searched for {few} days.",
     "It was {second} who knew the answer."),
    ("Since then the two have been friends.", "They shared a cake and told stories until midnight.", "{name} learned that giving something back can be the best gift."),
)  # fmt: skip


def story(dice: Dice) -> Draft:
    """A story of five sentences about a given animal, place and thing."""
    first, second = dice.sample([f"a {animal}" for animal in TEXT_POOLS["animal"]], 2)
    pools = TEXT_POOLS | {"weather": ("foggy", "sunny", "rainy", "windy")}
    sentences = " ".join(dice.choice(options) for options in STORY).replace("{animal}", first).replace("{second}", second)
    ask = dice.choice(
        (
            "Write a very short story about {0} named {{name}}, {1}{{object}} and {{place}}.",
            "Tell a story in five sentences with {0} called {{name}}, {1}{{object}} and {{place}}.",
        )
    )
    instruction, text = fill(dice, [ask.format(first, f"{second}, "), sentences], pools)
    return Draft(instruction, text, group=f"{first} {second} {text}")


FAMILIES = (biography, advertisement, recommend, day_plan, story)
