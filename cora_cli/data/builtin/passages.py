"""Short generated news passages and tasks about them: a summary, a headline, an answer to a question.

Every passage is invented: it teaches reading, not facts.
"""

from dataclasses import dataclass

from cora_cli.data.builtin.build import Dice, Draft
from cora_cli.data.builtin.words import POOLS, Pools, fill


@dataclass(frozen=True)
class Scenario:
    """Templates of one kind of event; `asides` are true but do not belong in a summary."""

    story: tuple[str, ...]
    asides: tuple[str, ...]
    summary: str
    headline: str
    questions: tuple[tuple[str, str], ...]


EVENT_POOLS: Pools = POOLS | {
    "shop": ("bakery", "bookshop", "bicycle repair shop", "flower shop", "tea house", "toy shop", "second-hand clothes shop"),
    "cause": ("heavy rain", "a burst pipe", "a power cut", "strong wind", "a broken signal", "a small fire"),
    "building": ("library", "sports hall", "museum", "swimming pool", "primary school", "town hall"),
    "animal": ("otter", "barn owl", "red fox", "beaver", "white stork", "grey seal"),
    "crop": ("tomatoes", "onions", "strawberries", "potatoes", "pumpkins", "apples"),
    "topic": ("sleep", "screen time", "walking to work", "reading aloud", "noise in offices", "breakfast habits"),
    "finding": (
        "small daily changes work better than big plans",
        "people underestimate how much they forget",
        "the effect disappears after a month without practice",
        "younger volunteers improved the most",
        "short breaks raise concentration",
    ),
    "game": ("football", "handball", "rugby", "hockey", "volleyball", "basketball"),
    "course": ("pottery", "first aid", "bread baking", "bicycle repair", "Spanish", "photography"),
    "weather": ("cold", "rainy", "sunny", "windy", "foggy"),
}

SCENARIOS = (
    Scenario(
        ("On {day}, {name} {surname} opened a {shop} in the centre of {town}.",
         "The shop employs {few} people and is open every day except {workday}.",
         "{name} had saved for {few2} years to pay the rent."),
        ("The walls are painted yellow.", "A neighbour brought flowers.", "The morning was {weather}, but people still queued outside."),
        "{name} {surname} opened a {shop} in {town} that employs {few} people, after saving for {few2} years.",
        "New {shop} opens in the centre of {town}",
        (("Who opened the shop?", "The shop was opened by {name} {surname}."),
         ("How many people work in the shop?", "The shop employs {few} people."),
         ("On which day is the shop closed?", "The shop is closed on {workday}."),
         ("How long did the owner save for it?", "The owner, {name} {surname}, saved for {few2} years.")),
    ),
    Scenario(
        ("Trains between {town} and {town2} were stopped for {few} hours on {day} because of {cause}.",
         "About {hundreds} passengers had to continue by bus.",
         "The railway company will refund tickets until the end of {month}."),
        ("Some travellers played cards while they waited.", "A café at the station gave away tea.", "It was a {weather} day."),
        "Because of {cause}, trains between {town} and {town2} stopped for {few} hours and about {hundreds} passengers took buses.",
        "Trains between {town} and {town2} stopped by {cause}",
        (("Why were the trains stopped?", "The trains were stopped because of {cause}."),
         ("How many passengers had to take the bus?", "About {hundreds} passengers had to continue by bus."),
         ("Until when can tickets be refunded?", "Tickets are refunded until the end of {month}."),
         ("For how long did no trains run?", "No trains ran for {few} hours.")),
    ),
    Scenario(
        ("The council of {town} has decided to renovate the {building} for {hundreds} thousand euros.",
         "Work starts in {month} and should take {some} months.",
         "Councillor {name} {surname} said that the roof was the most urgent problem."),
        ("The meeting lasted until late in the evening.", "Visitors can see the plans in the entrance hall.", "The vote was on {day}."),
        "{town} will renovate its {building} for {hundreds} thousand euros, starting in {month} and taking {some} months.",
        "{town} to renovate its {building}",
        (("What will be renovated?", "The {building} of {town} will be renovated."),
         ("When does the work start?", "The work starts in {month}."),
         ("What is the most urgent problem, and who said so?", "Councillor {name} {surname} said that the roof is the most urgent problem."),
         ("How long should the work take?", "The work should take {some} months.")),
    ),
    Scenario(
        ("Hikers near {town} found an injured {animal} on {day} and called the wildlife station.",
         "Vet {name} {surname} treated a broken leg and expects it to recover in {few} weeks.",
         "The animal will then be released by the river."),
        ("The hikers shared their sandwiches with the rescuers.", "It was {weather} on the trail.", "The station was founded in {year}."),
        "Hikers near {town} found an injured {animal}; vet {name} {surname} expects it to recover in {few} weeks before its release.",
        "Injured {animal} rescued near {town}",
        (("What was wrong with the animal?", "The {animal} had a broken leg."),
         ("Who treated the animal?", "It was treated by the vet {name} {surname}."),
         ("Where will the animal be released?", "It will be released by the river."),
         ("How long will the recovery take?", "The vet expects a recovery in {few} weeks.")),
    ),
    Scenario(
        ("A study led by {name} {surname} followed {hundreds} adults in {town} for {some} months to learn about {topic}.",
         "It concludes that {finding}.",
         "The team now plans to repeat the work with teenagers."),
        ("The volunteers received a book voucher.", "The results were presented on a {weather} {day}.", "The laboratory is next to a park."),
        "A study of {hundreds} adults in {town} about {topic} concludes that {finding}.",
        "Study of {topic}: {finding}",
        (("How many adults took part?", "{hundreds} adults took part in the study."),
         ("What does the study conclude?", "The study concludes that {finding}."),
         ("What is planned next?", "The team plans to repeat the work with teenagers."),
         ("Who led the study, and what was it about?", "{name} {surname} led the study, which was about {topic}.")),
    ),
    Scenario(
        ("The {game} team of {town} beat {town2} on {day} in front of {hundreds} spectators.",
         "Captain {name} {surname}, who returned after an injury of {few} weeks, decided the match in the last minutes.",
         "{town} is now in second place."),
        ("The stands were decorated with paper flags.", "A school choir sang before the start.", "Outside it was {weather}."),
        "{town} beat {town2} at {game} thanks to captain {name} {surname} and is now in second place.",
        "{town} beats {town2} at {game}",
        (("Who won the match?", "The team of {town} won against {town2}."),
         ("Who decided the match?", "Captain {name} {surname} decided it in the last minutes."),
         ("How many people watched?", "{hundreds} spectators watched the match."),
         ("Why had the captain been absent?", "The captain, {name} {surname}, had been injured for {few} weeks.")),
    ),
    Scenario(
        ("Farmers around {town} expect to harvest {many} per cent more {crop} than last year.",
         "They explain it with a mild spring and {few} weeks of regular rain.",
         "Prices at the market fell by {some} cents a kilo."),
        ("A scarecrow contest takes place on {day}.", "Many of the farms are family businesses.", "The market hall dates from {year}."),
        "After a mild spring, farmers around {town} expect {many} per cent more {crop}, and prices have fallen.",
        "Good year for {crop} around {town}",
        (("How much larger will the harvest be?", "The farmers expect {many} per cent more {crop} than last year."),
         ("Why is the harvest better?", "There was a mild spring and {few} weeks of regular rain."),
         ("What happened to the prices?", "Prices at the market fell by {some} cents a kilo.")),
    ),
    Scenario(
        ("From {month} on, the community centre in {town} offers a free {course} course every {workday} evening.",
         "There are places for {some} people, and {name} {surname} will teach it.",
         "Those who want to join must sign up at the front desk."),
        ("The centre has a new coffee machine.", "Last year's course was about knitting.", "Parking is free after {hour}."),
        "The community centre in {town} offers a free {course} course with {some} places every {workday} evening from {month}.",
        "Free {course} course in {town} from {month}",
        (("What does the course cost?", "The course is free."),
         ("Who teaches the course?", "{name} {surname} will teach the {course} course."),
         ("When does the course take place?", "It takes place every {workday} evening from {month} on."),
         ("How can people join?", "People can join by signing up at the front desk.")),
    ),
)  # fmt: skip


def _passage(dice: Dice) -> tuple[str, str, str, list[tuple[str, str]]]:
    """Text, summary, headline and (question, answer) pairs of one invented event."""
    scenario = dice.choice(SCENARIOS)
    asides = dice.sample(scenario.asides, dice.between(1, 2))
    pairs = [text for pair in scenario.questions for text in pair]
    filled = fill(dice, [*scenario.story, *asides, scenario.summary, scenario.headline, *pairs], EVENT_POOLS)
    story, rest = filled[: len(scenario.story)], filled[len(scenario.story) :]
    for aside in rest[: len(asides)]:
        story.insert(dice.between(1, len(story)), aside)
    summary, headline, *answers = rest[len(asides) :]
    return " ".join(story), summary, headline, list(zip(answers[::2], answers[1::2], strict=True))


def summarise(dice: Dice) -> Draft:
    """A passage in one sentence."""
    text, summary, _, _ = _passage(dice)
    instruction = dice.choice((
        "Summarise the following text in one sentence.",
        "Give a one-sentence summary of this passage.",
        "What is the main point of this text? Answer in a single sentence.",
        "Shorten this news item to one sentence and leave out the details that do not matter.",
    ))  # fmt: skip
    return Draft(instruction, summary, text)


def headline(dice: Dice) -> Draft:
    """A passage's headline."""
    text, _, title, _ = _passage(dice)
    instruction = dice.choice((
        "Write a headline for this news item.",
        "Suggest a short title for the passage below.",
        "Give this text a headline of at most twelve words.",
    ))  # fmt: skip
    return Draft(instruction, title[:1].upper() + title[1:], text)


def answer_question(dice: Dice) -> Draft:
    """One or two questions about a passage, or one that it does not answer."""
    text, _, _, pairs = _passage(dice)
    if dice.chance(0.12):
        question = dice.choice(
            ("What was the temperature?", "How old is the person in charge?", "What did the local newspaper say about it?")
        )
        answer = "The passage does not say."
    elif dice.chance(0.3):
        (first, reply), (second, other) = dice.sample(pairs, 2)
        question, answer = f"{first} {second}", f"{reply} {other}"
    else:
        question, answer = dice.choice(pairs)
    if dice.chance(0.5):
        return Draft(f"Read the passage and answer: {question}", answer, text)
    lead = dice.choice(
        ("Answer the question using only the passage.", "Use the text below to answer the question in a full sentence.")
    )
    return Draft(lead, answer, f"{text}\n\nQuestion: {question}", group=text)


def key_facts(dice: Dice) -> Draft:
    """What a passage reports, as a bulleted list."""
    text, _, _, pairs = _passage(dice)
    instruction = dice.choice((
        "List the key facts of this text as bullet points.",
        "Note the most important information from the passage in a bulleted list.",
        "Turn this news item into bullet points, one full sentence each.",
    ))  # fmt: skip
    return Draft(instruction, "\n".join(f"- {answer[:1].upper()}{answer[1:]}" for _, answer in pairs), text)


FAMILIES = (summarise, key_facts, headline, answer_question)
