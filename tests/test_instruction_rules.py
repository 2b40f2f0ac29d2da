"""The rules by which an answer's form is read, and that every row of the bank can be followed."""

import json
from pathlib import Path

import pytest

from truthward.instruction_rules import FUNCTION_WORDS, LANGUAGES, PARAMETER, RULES, follows, follows_loosely, parameters_of

BANK = Path(__file__).parent.parent / "data" / "evals" / "instructions"

# Rule, its parameter, answers that follow, answers that do not.
CASES: list[tuple[str, object, list[str], list[str]]] = [
    (
        "items",
        3,
        [
            "1. Apples\n2. Pears\n3. Plums",
            "Here you are:\n\n- salt\n- oil, and more oil\n- bread\n\nEnjoy!",
            "1. Fruit\n- apple\n- pear\n2. Bread\n3. Oil",
            "Apples\nPears\nPlums",
            "Here they are:\nApples\nPears\nPlums",
            "Apples, pears and plums.",
            "Of all the fruits, these are my three: apples, pears, and plums",
        ],
        [
            "1. Apples\n2. Pears",
            "- a\n- b\n- c\n- d",
            "Apples and pears",
            "Well, it is hard to say with any certainty at all, really.",
        ],
    ),
    ("min_items", 2, ["- a\n- b", "red, green, blue"], ["1. Only this", "I would not know any of those at all."]),
    ("max_words", 4, ["Bless you!", "It's a well-known tune."], ["This one has five words.", "a b c d e f"]),
    ("min_words", 4, ["Four words it has.", "- one two\n- three four"], ["Too short.", "don't well-known yes"]),
    (
        "sentences",
        2,
        ["It rains. We stay in.", 'Mr. Hill paid 3.50 at 9 a.m. today! "Did he?"', "1. Wash it.\n2. Dry it."],
        ["It rains and we stay in.", "One. Two? Three!", "A title\nOne. Two.", "e.g. this one"],
    ),
    ("upper_case", None, ["A DOG BARKS.", "42 COWS!"], ["A dog barks.", "A DOG BARKs", "42"]),
    ("lower_case", None, ["a dog barks.", "été, 3 times"], ["A dog barks.", "i saw Tom", "42"]),
    ("use_word", "shell", ["A Shell lay there.", 'Say "shell"!'], ["Two shells lay there.", "a nutshell"]),
    ("use_word", "Milch", ["milk - milch", "Milk (die Milch)"], ["Milk", "Milchkaffee"]),
    ("avoid_word", "snow", ["It is cold.", "A snowman stood there."], ["Snow fell.", "No snow!"]),
    ("question", None, ["How are you?", '"Where is it?" \n', "Nice. And you?"], ["Ask me.", "Why? Because."]),
    (
        "language",
        "fr",
        ["Le chat est sur la chaise.", "Bonjour, ça va ?", "J'ai faim."],
        ["The cat is here.", "Gut, und du?"],
    ),
    ("language", "es", ["La casa es muy grande.", "Me llamo Ana.", "No, gracias"], ["No idea, sorry.", "C'est la vie."]),
    ("language", "de", ["Das Haus ist groß.", "Gute Nacht, mein Freund!"], ["The hat was so good in an old war.", "Katze"]),
    ("json", None, ['{"animal": "cow"}', ' {"a": [1, 2]}\n'], ['["cow"]', "{animal: cow}", 'Here: {"a": 1}']),
    ("numbered", None, ["1. Boil.\n2. Peel.", "Do this:\n1) Dig\n2) Sow\n3) Wait"], ["1. Boil.", "- a\n- b", "2. a\n3. b"]),
    ("bullets", None, ["- a\n- b", "* a\n  * b", "• a\n• b"], ["- a", "1. a\n2. b", "-a\n-b"]),
    (
        "comma_list",
        3,
        ["Anna, Eva, Mia", "mild rain, snow, strong wind, sun."],
        ["Anna, Eva", "Anna,\nEva,\nMia", "These are some of the names, Anna, Eva"],
    ),
    ("quoted", None, ['"Ahoy!"', "“Who took my honey?”\n"], ['He said "ahoy"', "'Ahoy!'", '"Ahoy!']),
    ("starts_with", "Dear Anna", ["Dear Anna, hi.", '"dear anna!'], ["Hi, dear Anna", "Dear Annabel"]),
    (
        "ends_with",
        "see you soon",
        ["Bye, see you soon!", 'He said "See you soon."'],
        ["See you sooner", "See you soon, Ben"],
    ),
    ("one_of", ["yes", "no"], ["Yes.", "**no**", "YES!"], ["Yes, it is.", "Maybe", "yes no"]),
    ("one_of", ["Brot", "das Brot"], ["Brot", "Das Brot."], ["bread", "Ein Brot"]),
    ("number", None, ["8", "1,000.", "-3.5"], ["eight", "8 legs", "1,00"]),
]
NAMES = sorted({name for name, *_ in CASES})


def rule(name: str, value: object = None) -> dict[str, object]:
    return {"rule": name} if name not in PARAMETER else {"rule": name, PARAMETER[name]: value}


@pytest.mark.parametrize(("name", "value", "good", "bad"), CASES, ids=[f"{n}-{v}" for n, v, *_ in CASES])
def test_each_rule_tells_answers_apart(name, value, good, bad):
    assert len(good) >= 2
    assert len(bad) >= 2
    assert [a for a in good if not follows(a, [rule(name, value)])] == []
    assert [a for a in bad if follows(a, [rule(name, value)])] == []


def test_every_rule_is_in_the_table():
    assert sorted(RULES) == NAMES
    assert set(PARAMETER) < set(RULES)
    assert set(LANGUAGES) < set(FUNCTION_WORDS)


# ------------------------------------------------------------------------------------------------- rows of several rules


def test_all_rules_have_to_hold():
    both = [rule("question"), rule("max_words", 3)]
    assert follows("How are you?", both)
    assert not follows("How are you today?", both)
    assert not follows("I am well.", both)


@pytest.mark.parametrize(
    ("answer", "rules"),
    [
        ("Sure! Here it is:\nA DOG BARKS.", [rule("upper_case")]),
        ("a dog barks.\nHope That Helps!", [rule("lower_case")]),
        ("**Yes**, it is", [rule("starts_with", "yes")]),
        ('```json\n{"a": "cow"}\n```', [rule("json")]),
        ('"42"', [rule("number")]),
        ('**"Ahoy!"**', [rule("quoted")]),
        ("Here is one:\n\n**“1024”**\n\nAnything else?", [rule("number")]),
        ("Of course.\n*Anna, Eva, Mia*", [rule("comma_list", 3), rule("max_words", 3)]),
    ],
)
def test_loosely_forgives_markup_and_polite_lines(answer, rules):
    assert not follows(answer, rules)
    assert follows_loosely(answer, rules)


def test_loosely_the_same_reading_has_to_follow_every_rule():
    """Without its first line the answer is a question, without its last it is short: never both."""
    rules = [rule("question"), rule("max_words", 2)]
    assert follows_loosely("Hello you.\nHow are you?", [rules[0]])
    assert follows_loosely("Hello you.\nHow are you?", [rules[1]])
    assert not follows_loosely("Hello you.\nHow are you?", rules)


@pytest.mark.parametrize("name", ["avoid_word", "max_words", "sentences"])
@pytest.mark.parametrize(
    "answer", ["", " \n", "...", "***\n!?", "no " * 8, "a dog " + "yes, " * 9, "A fine dog.\n" + "dog " * 9]
)
def test_a_degenerate_answer_follows_nothing(name, answer):
    rules = [rule(name, {"avoid_word": "snow"}.get(name, 1))]
    assert not follows(answer, rules)
    assert not follows_loosely(answer, rules)


def test_seven_equal_words_or_half_of_them_are_no_degenerate_answer():
    assert follows("ha " * 7, [rule("lower_case")])
    assert follows("ha " * 4 + "a b c d", [rule("lower_case")])
    assert not follows("ha " * 5 + "a b c", [rule("lower_case")])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rule": "rhymes"}, "unknown rule 'rhymes'; the rules are items"),
        ({"count": 3}, "unknown rule None"),
        ({"rule": ["items"]}, "unknown rule"),
        ({"rule": "items"}, r"'items' takes \['count'\], not nothing"),
        ({"rule": "items", "count": 3, "word": "x"}, r"takes \['count'\], not \['count', 'word'\]"),
        ({"rule": "json", "count": 3}, r"'json' takes nothing, not \['count'\]"),
        ({"rule": "items", "count": 0}, "'count' has to be a whole number above 0, not 0"),
        ({"rule": "items", "count": True}, "whole number"),
        ({"rule": "items", "count": "3"}, "whole number"),
        ({"rule": "use_word", "word": ""}, "'word' has to be a word"),
        ({"rule": "starts_with", "text": "..."}, "some words"),
        ({"rule": "language", "code": "it"}, "one of fr, es, de, not 'it'"),
        ({"rule": "one_of", "options": []}, "a list of answers"),
        ({"rule": "one_of", "options": "yes"}, "a list of answers"),
    ],
)
def test_a_rule_that_does_not_exist_or_lacks_something_is_refused(given, message):
    for refuse in (parameters_of, lambda rule: follows("An answer.", [rule])):
        with pytest.raises(ValueError, match=message):
            refuse(given)


# --------------------------------------------------------------------------------------------------------------- the bank

ANSWERS = {
    "items-003": "- It gives you energy.\n- You feel less hungry later.",
    "items-007": "Police officer, nurse and pilot.",
    "items-018": "- Bring over a cake.\n- Write a card.",
    "items-023": "1. Drink water.\n2. Stay in the shade.\n3. Wear a hat.",
    "short-002": "It keeps food cold and fresh.",
    "short-009": "Honey.",
    "short-010": "A bridge is a road over a river or a valley.",
    "short-017": "Bless you!",
    "case-001": "A DOG.",
    "case-008": "they carry twigs and moss to a branch and weave them together.",
    "case-013": "THE MOON IS A BALL OF ROCK THAT CIRCLES THE EARTH.",
    "use-word-002": "Fresh coffee smells wonderful in the morning.",
    "use-word-010": "An old man sold cheese at the market.",
    "use-word-015": "The boat went down the river. Nobody was in a hurry.",
    "use-word-022": "He found a coin in his pocket.",
    "question-back-001": "How much time do you have for walks?",
    "question-back-017": "Owls can turn their heads very far. Have you ever heard one?",
    "question-back-021": "The moon looks pale tonight. How many stars can you see?",
    "languages-001": "Bonjour à tous !",
    "languages-006": "Das Haus ist groß.",
    "languages-007": "Gato.",
    "languages-010": "Soy Ana y trabajo en la oficina.",
    "languages-013": "Comment allez-vous ?",
    "languages-014": "Uno y tres.",
    "languages-023": "Milk - die Milch",
    "languages-025": "Guten Abend, Frau Klein!",
    "format-001": '{"name": "Rosa Bell", "age": 41}',
    "format-006": "1. Read a book.\n2. Bake some bread.",
    "format-008": "sun, rain, snow, fog",
    "format-020": '"Happy New Year!"',
    "start-end-003": "Take care on the road, and see you soon!",
    "start-end-020": "Hello, Ben. I have to run, so goodbye!",
    "choice-003": "8",
    "choice-016": "A.",
    "ordinary-009": "Dear Grandma, thank you so much for the scarf, which I wear every day.",
    "ordinary-010": "- Cook at home.\n- Buy what is in season.\n- Freeze leftovers.",
    "ordinary-013": "Warm air goes up. Cool air rushes in to fill its place. That rush is the wind.",
    "home-015": '{"colour": "white", "height": "40 cm"}',
    "home-018": "- Throw out what you never use.\n- Give each thing a place.",
    "travel-006": "Ich hätte gern eine Fahrkarte, bitte.",
    "travel-017": "¿Dónde está la playa?",
    "hobbies-006": "J'ai lu un livre sur la mer.",
    "hobbies-019": "A worm is a gardener's friend. It loosens the soil in which we plant our beans.",
    "school-018": "The choir sings on Friday at six.\nKind regards.",
}


@pytest.fixture(scope="module")
def splits():
    return {
        split: {
            file.stem: [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            for file in sorted((BANK / split).glob("*.jsonl"))
        }
        for split in ("test", "dev")
    }


@pytest.fixture(scope="module")
def bank(splits):
    return [row for topics in splits.values() for rows in topics.values() for row in rows]


def test_there_are_enough_rows_and_topics_apart(splits, bank):
    assert sum(map(len, splits["test"].values())) >= 220
    assert sum(map(len, splits["dev"].values())) >= 72
    assert (len(splits["test"]), len(splits["dev"])) == (10, 4)
    assert not set(splits["test"]) & set(splits["dev"])
    assert len({row["id"] for row in bank}) == len(bank)
    assert len({row["prompt"] for row in bank}) == len(bank)


def test_every_row_has_its_topic_and_one_or_two_known_rules(splits):
    for topics in splits.values():
        for topic, rows in topics.items():
            for number, row in enumerate(rows, 1):
                assert list(row) == ["id", "topic", "prompt", "rules"]
                assert (row["id"], row["topic"]) == (f"{topic}-{number:03}", topic)
                assert 1 <= len(row["rules"]) <= 2
                assert all(isinstance(parameters_of(r), dict) for r in row["rules"])


def test_requests_are_short(bank):
    assert [row["prompt"] for row in bank if not 8 <= len(row["prompt"].split()) <= 30] == []


def test_every_rule_is_asked_for_in_both_splits(splits):
    for topics in splits.values():
        assert {r["rule"] for rows in topics.values() for row in rows for r in row["rules"]} == set(RULES)


def test_what_has_to_be_said_word_for_word_is_in_the_request(bank):
    """Words of another language are not: the row asks for them in English."""
    for row in bank:
        said = [r[key] for r in row["rules"] for key in ("word", "text") if key in r]
        if row["topic"] != "languages":
            assert [text for text in said if text.lower() not in row["prompt"].lower()] == []


def test_a_good_answer_follows(bank):
    by_id = {row["id"]: row for row in bank}
    assert len(ANSWERS) >= 40
    assert set(ANSWERS) <= set(by_id)
    assert [key for key, answer in ANSWERS.items() if not follows(answer, by_id[key]["rules"])] == []


@pytest.mark.parametrize("answer", ["Yes.", "I am not sure what to say about that.", "- a\n- b\n- c"])
def test_no_answer_serves_for_all_requests(bank, answer):
    assert sum(follows(answer, row["rules"]) for row in bank) < 0.25 * len(bank)
