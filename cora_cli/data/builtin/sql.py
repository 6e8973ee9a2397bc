"""Questions about small tables, answered with one SQL query in the dialect that SQLite, PostgreSQL and MySQL share.

The query and the question are built from the same choices.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from cora_cli.data.builtin.build import Dice, Draft
from cora_cli.data.builtin.words import FRUITS, GOODS, NAMES, SURNAMES, TOWNS


@dataclass(frozen=True)
class Table:
    """A table: its `things` in words, text columns with their possible values, integer columns with their range."""

    name: str
    things: str
    label: str
    texts: Mapping[str, tuple[str, ...]]
    integers: Mapping[str, tuple[int, int]]

    @property
    def schema(self) -> str:
        """Its CREATE TABLE statement."""
        columns = [
            f"{self.label} TEXT",
            *(f"{name} TEXT" for name in self.texts),
            *(f"{name} INTEGER" for name in self.integers),
        ]
        return f"CREATE TABLE {self.name} ({', '.join(columns)});"


TABLES = (
    Table("employees", "employees", "name", {"city": TOWNS, "department": ("Sales", "Legal", "Support", "Research", "Finance")},
          {"salary": (2000, 9000), "age": (18, 65)}),
    Table("products", "products", "title", {"category": ("Kitchen", "Garden", "Office", "Travel", "Sport"), "maker": SURNAMES},
          {"price": (3, 400), "stock": (0, 200)}),
    Table("books", "books", "title", {"author": SURNAMES, "genre": ("Crime", "Poetry", "History", "Travel", "Fantasy")},
          {"year": (1950, 2024), "pages": (80, 900)}),
    Table("flights", "flights", "flight_number", {"origin": TOWNS, "airline": ("Skylark", "Northwind", "Albatross", "Bluebird")},
          {"delay": (0, 240), "passengers": (40, 320)}),
    Table("orders", "orders", "customer", {"item": GOODS, "status": ("open", "paid", "shipped", "cancelled")},
          {"quantity": (1, 40), "total": (5, 900)}),
    Table("students", "students", "name", {"school": TOWNS, "subject": ("Physics", "Music", "Biology", "Latin", "Art")},
          {"score": (10, 100), "absences": (0, 30)}),
    Table("harvests", "harvests", "farmer", {"fruit": FRUITS, "region": TOWNS}, {"weight": (20, 900), "year": (2005, 2024)}),
    Table("players", "players", "name", {"team": TOWNS, "position": ("goal", "defence", "midfield", "attack")}, {"goals": (0, 45), "age": (17, 40)}),
    Table("rentals", "rentals", "customer", {"vehicle": ("bicycle", "van", "scooter", "boat"), "agent": NAMES}, {"days": (1, 28), "price": (10, 700)}),
)  # fmt: skip
NOT_ADDED = ("year", "age")  # columns whose sum means nothing


def _condition(dice: Dice, table: Table, column: str) -> tuple[str, str]:
    """A WHERE clause on `column` without its keyword, and the same in words."""
    if column in table.texts:
        value = dice.choice(table.texts[column])
        return f"{column} = '{value}'", f"with {column} {value}"
    low, high = table.integers[column]
    limit = dice.between(low + 1, high - 1)
    sign, words = dice.choice(((">", "above"), ("<", "below"), (">=", "of at least"), ("<=", "of at most")))
    return f"{column} {sign} {limit}", f"with {column} {words} {limit}"


def query(dice: Dice) -> Draft:
    """One question about one table, with the query that answers it."""
    table = dice.choice(TABLES)
    first, second = dice.sample([*table.texts, *table.integers], 2)
    where, such = _condition(dice, table, first)
    other, also = _condition(dice, table, second)
    number, text = (dice.choice([column for column in columns if column != first]) for columns in (table.integers, table.texts))
    count, name, label, things = dice.between(2, 10), table.name, table.label, table.things
    low, high = table.integers[number]
    limit = dice.between(low + 1, high - 1)
    function, called = dice.choice(
        (("AVG", "average"), ("MAX", "highest"), ("MIN", "lowest"), ("SUM", "total"))[: 3 if number in NOT_ADDED else 4]
    )
    joint = dice.choice(("AND", "OR"))
    question, sql = dice.choice((
        (f"Show the {label} of all {things} {such}.", f"SELECT {label} FROM {name} WHERE {where};"),
        (f"How many {things} are there {such}?", f"SELECT COUNT(*) FROM {name} WHERE {where};"),
        (f"Show the {label} and {number} of {things} {such}, sorted by {number} from high to low.",
         f"SELECT {label}, {number} FROM {name} WHERE {where} ORDER BY {number} DESC;"),
        (f"List the {label} of the {count} {things} with the highest {number}.", f"SELECT {label} FROM {name} ORDER BY {number} DESC LIMIT {count};"),
        (f"List the {label} of the {count} {things} with the lowest {number}.", f"SELECT {label} FROM {name} ORDER BY {number} ASC LIMIT {count};"),
        (f"What is the {called} {number} of all {things}?", f"SELECT {function}({number}) FROM {name};"),
        (f"What is the {called} {number} of {things} {such}?", f"SELECT {function}({number}) FROM {name} WHERE {where};"),
        (f"What is the {called} {number} for each {text}?", f"SELECT {text}, {function}({number}) FROM {name} GROUP BY {text};"),
        (f"Count the {things} for each {text}.", f"SELECT {text}, COUNT(*) FROM {name} GROUP BY {text};"),
        (f"Which {text} values have more than {count} {things}?", f"SELECT {text} FROM {name} GROUP BY {text} HAVING COUNT(*) > {count};"),
        (f"Show everything about {things} {such} {joint.lower()} {also}.", f"SELECT * FROM {name} WHERE {where} {joint} {other};"),
        (f"List the different {text} values of {things} {such}.", f"SELECT DISTINCT {text} FROM {name} WHERE {where};"),
        (f"Delete all {things} {such}.", f"DELETE FROM {name} WHERE {where};"),
        (f"Set the {number} of all {things} {such} to {limit}.", f"UPDATE {name} SET {number} = {limit} WHERE {where};"),
    ))  # fmt: skip
    lead = dice.choice(("Write an SQL query. ", "Answer with one SQL statement. ", "SQL: ", "Translate into SQL. "))
    return Draft(lead + question, sql, table.schema, group=question)


FAMILIES = (query,)
