"""More examples for chapter 7, made by rules: right by construction, and as many as are asked for.

    python tests/benchmarks/instruction_generator.py --n 20000 --out more.json

Only kinds whose answer a rule gives, in the form of data/instructions.json. The wordings are those
of that file's training examples; words, sentences and passages are made here, and no example has
the group (see `group_key`) of a validation or test example. The kind that chapter 7 holds out,
`negative`, is not made. `instruction.py` beside this file trains with these examples.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from helpers.common import data_path
from helpers.instruction import group_key, load_examples, train_val_test_split

Example = dict[str, str]


def words(text: str) -> list[str]:
    """The words of a text."""
    return text.split()


HE = words("""
    Adam Alan Albert Arthur Basil Bernard Charles Daniel Edgar Edmund Felix Francis Gilbert
    Harold Hector Isaac Jacob Jasper Julian Leonard Lewis Matthew Maurice Nicholas Oscar
    Patrick Philip Ralph Roger Rupert Samuel Stephen Theodore Thomas Victor Walter William""")
SHE = words("""
    Agnes Amy Beatrice Bridget Caroline Cecily Charlotte Dora Edith Eleanor Elsie Esther Eva
    Fanny Florence Frances Grace Hannah Harriet Isabel Jane Janet Judith Julia Laura Lydia
    Mabel Margaret Marian Maud Nancy Olive Phoebe Rachel Sarah Sophia Susan Sylvia Ursula
    Winifred""")
TOWNS = words("""
    Bath Bedford Bolton Boston Bristol Cambridge Canterbury Carlisle Chester Coventry Dover
    Ely Exeter Gloucester Hastings Hereford Leeds Lewes Lichfield Lynn Oxford Plymouth
    Preston Reading Ripon Rye Salisbury Stafford Truro Wells Whitby Winchester Windsor
    Worcester""")
MEN = words("king prince monk uncle grandfather husband boy lord abbot duke butler bishop squire")
WOMEN = words("queen princess nun aunt grandmother wife girl lady mother duchess milkmaid widow")
JOBS = words("""
    actor archer artist banker barber beggar blacksmith boatman brewer builder butcher
    carpenter clerk coachman cobbler cooper dancer doctor farmer ferryman fiddler gardener
    groom guard herdsman hunter innkeeper joiner juggler lawyer mason merchant messenger
    painter peddler pilgrim piper plumber poet porter potter printer sailor schoolmaster
    scholar sculptor servant shepherd singer smith soldier spinner surgeon tinker trader
    traveller watchman weaver woodcutter""")
ANIMALS = words("""
    ant badger bat bee beetle blackbird boar bull butterfly calf camel canary chicken cock
    colt crab crane cricket crow cuckoo deer dove dragonfly duck eel elephant falcon ferret
    finch fly frog goose gull hare hawk hedgehog heron herring hornet horse hound jackdaw
    kite lark lion lobster magpie mole monkey moth mouse nightingale otter ox oyster parrot
    partridge peacock perch pheasant pig pigeon pike rabbit rat raven robin rook salmon seal
    sheep snail snake sparrow spider squirrel stag stork swallow swan tiger toad tortoise
    turkey viper wasp weasel whale worm wren""")
PLANTS = [plant.replace("_", " ") for plant in words("""
    alder apple_tree ash_tree barley beech birch bluebell bramble bush buttercup cedar
    cherry_tree clover cowslip daffodil daisy elm fern fir foxglove hawthorn hazel heather
    holly_bush larch laurel lavender lilac lily linden marigold mushroom myrtle oak orchid
    pansy pear_tree pine poplar poppy primrose reed rose rosemary snowdrop sunflower thistle
    thorn_bush thyme tulip turnip vine violet walnut_tree wheat willow yew""")]
THINGS = words("""
    anvil apron arrow bag ball barrel basin basket bed bell belt bench blanket book bottle
    bow bowl box bracelet brick broom brush bucket button cage candlestick cap card carpet
    cart chain chair chest cloak clock coat collar comb cork cradle crown cup curtain
    cushion desk diary dish doll drum fan flag flute fork frame glove goblet hammer
    handkerchief harp hat hook horn inkwell jar jug kettle key knife ladder lamp lantern
    letter lock mantle map mask mat medal mirror mug nail necklace needle net oar paddle
    pail pan parcel pen pencil picture pillow pin pipe pitcher plank plate plough pot purse
    quilt rake razor ribbon ring robe rope rug sack saddle sail saw scarf scythe shawl
    shield ship shirt shoe shovel sickle sieve sledge spade spear spoon stick stocking stool
    sword table tent thimble tin torch towel toy tray trumpet trunk tub umbrella vase veil
    violin wagon wallet watch wheel whip whistle wig""")
FOOD = words("""
    bacon barley beef biscuits bread broth butter cabbage cake carrots celery cheese
    cherries chestnuts cream cucumbers currants eggs fish garlic ginger gravy ham honey jam
    leeks lemons lettuce meat melons milk mustard mutton nuts oatmeal onions oranges parsley
    pastry peaches pears peas pepper pickles pie plums pork porridge potatoes pudding
    radishes raisins rice salad salt sausages soup spinach stew sugar toast tomatoes trout
    turnips veal vinegar walnuts""")
PLACES = words("""
    abbey alley attic barn bakery bay cabin camp castle cathedral cave cellar chapel church
    cottage courtyard dairy ditch farm fort garden granary grove hall hut inn jail kitchen
    lane library lighthouse loft market meadow mill mine monastery office palace parlour
    pasture pond prison quarry ruin school shed shop stable street swamp temple theatre
    tower tunnel valley village vineyard wood workshop yard""")
COLOURS = words("""
    black blue brown crimson gold green grey orange pink purple red scarlet silver white
    yellow""")
ADJECTIVES = words("""
    ancient broken cheap clean clever cold crooked cruel damp dark deep dirty dry dusty
    empty famous fine foreign fresh friendly gentle golden great handsome heavy hollow
    honest hungry huge kind lame large lazy lonely long lost lovely mighty muddy narrow new
    noble old patient plain polite poor pretty proud quiet rich rotten round rusty sharp shy
    silent simple small soft stout strange strong stupid tall thick thin tiny tired warm
    weak wet wide wild wise wooden young""")
NUMBERS = words("two three four five six seven eight nine ten eleven twelve twenty")
DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = words("""
    January February March April May June July August September October November December""")
RELATIONS = words("brother sister uncle aunt father mother cousin nephew niece son daughter")
MATERIALS = words("""
    oak silver gold iron glass clay leather copper stone wool silk tin brass ivory""")
PAST = dict(pair.split("/") for pair in words("""
    find/found hide/hid break/broke sell/sold buy/bought lose/lost steal/stole bring/brought
    throw/threw keep/kept see/saw draw/drew hold/held choose/chose eat/ate feed/fed
    catch/caught sleep/slept sit/sat sing/sang stand/stood run/ran swim/swam fall/fell
    forget/forgot drop/dropped"""))
ON_THINGS = words("""
    find hide break sell buy lose steal bring throw keep see draw hold choose forget carry
    mend wash paint drop clean need push pull lift burn fetch borrow polish want admire
    cover""")
ON_FOOD = words("eat cook taste share buy sell bring steal want smell carry order hide")
ON_ANIMALS = words("feed chase catch follow watch call love wash see find lose help fear scare")
WITHOUT = words("""
    sleep sit sing dance wait stand walk run hide work laugh cry swim fall play rest stay
    shout""")
RHYMES = [words(row) for row in re.split(" /\\s+|\n */ ?", """
    cake lake snake rake / night light knight right / bear pear chair hair / gold cold fold
    hold / ring king string wing / day hay clay tray / tree bee sea key / boat goat coat
    throat / hen pen ten men / pin fin tin chin / dog log frog fog / sock clock rock lock /
    hill mill bill pill / bed red shed head / nail sail tail snail / hand sand land band /
    rose nose hose toes / mouse house louse / bell well shell spell / fire wire tire liar /
    stone bone throne / cook book hook brook / sun bun nun gun / rain train chain grain / jam
    ham lamb ram / nest chest guest vest / moon spoon noon tune / wall ball hall shawl / four
    door floor shore / sheep sleep deep heap / cow plough brow / box fox ox rocks / star jar
    car tar / duck luck truck / mat cat hat rat / school pool fool / ship lip whip""")]
WRONG_PAST = words("find break sell buy lose steal bring throw keep draw hold choose eat catch")
FIELD = ("(?:name|age|town|job|number|things|thing|colour|price|relation|animal|day|food|"
         "children)")
QA = ["{} Copy the answer from the text.", "Answer from the passage: {}",
      "Find the answer in the passage: {}", "Use the text to answer: {}",
      "Give a short answer from the story: {}", "What does the text say? {}",
      "{} Answer with words from the passage.", "Read the passage and answer the question: {}"]
NOT_SAID = ['{} If the text does not say, answer "not said".',
            'Look for the answer in the story, and write "not said" if there is none: {}',
            'Answer from the passage, or write "not said" if it does not say: {}',
            'Find the answer in the text. If it is not there, write "not said". {}',
            'Can you tell from the passage? {} If not, write "not said".',
            '{} Use only the passage. Write "not said" if it does not tell.']


def add_s(word: str) -> str:
    """The third person of a verb, or the plural of a regular noun."""
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return word + "es"
    return word[:-1] + "ies" if re.search("[^aeiou]y$", word) else word + "s"


PLURAL = {"mouse": "mice", "goose": "geese", "ox": "oxen", "sheep": "sheep", "deer": "deer",
          "calf": "calves", "knife": "knives", "scarf": "scarves", "wife": "wives",
          "salmon": "", "herring": "", "trout": "", "pike": "", "perch": ""}  # "": not sure
NOUNS = [noun for noun in ANIMALS + THINGS + JOBS + PLACES
         if PLURAL.get(noun, "s") and not noun.endswith(("man", "tooth", "foot"))]


def plural(noun: str) -> str:
    return PLURAL.get(noun) or add_s(noun)


def past(verb: str) -> str:
    if verb in PAST:
        return PAST[verb]
    if verb.endswith("e"):
        return verb + "d"
    return verb[:-1] + "ied" if re.search("[^aeiou]y$", verb) else verb + "ed"


def a(noun: str) -> str:
    """The noun with its indefinite article."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def with_articles(text: str) -> str:
    """The text with "an" for "a" before a vowel."""
    return re.sub(r"\ba (?=[aeiou])", "an ", text)


def upper_first(text: str) -> str:
    return text[0].upper() + text[1:]


def joined(items: Sequence[str]) -> str:
    return f"{', '.join(items[:-1])} and {items[-1]}"


class Generator:
    """Makes examples of the kinds in `self.makers`; equal seeds give equal examples."""

    def __init__(self, seed: int = 0, words: Sequence[str] = ()) -> None:
        self.rng = random.Random(seed)
        examples = load_examples(data_path("instructions.json"))
        train, val, test = train_val_test_split(examples)
        self.forbidden = {group_key(e) for e in (*val, *test)}
        self.wordings: dict[str, list[str]] = defaultdict(list)
        for e in train:
            self.wordings[e["kind"]].append(e["instruction"])
        self.words = list(words) or NOUNS
        self.makers: dict[str, Callable[[], Example]] = {
            name.removeprefix("make_"): getattr(self, name)
            for name in dir(self) if name.startswith("make_")}
        # how often each is made: more where there is more to vary
        self.weights = {"passage_qa": 6, "qa_not_said": 3, "format": 3, "extract": 3, "json": 3,
                        "order": 3, "replace": 2, "add_word": 2, "tense": 2, "list_item": 2,
                        "letters": 2, "question": 2, "grammar": 1, "pronoun": 1, "count": 1,
                        "arithmetic": 1, "sequence": 1, "plural": 1, "category": 1}

    def __call__(self, n: int, kinds: Collection[str] | None = None) -> list[Example]:
        """n examples, no prompt twice, none of the group of a validation or test example."""
        names = [name for name in self.makers if kinds is None or name in kinds]
        weights = [self.weights[name] for name in names]
        made: dict[tuple[str, str], Example] = {}
        for _ in range(50 * n):
            if len(made) == n:
                break
            kind, = self.rng.choices(names, weights)
            instruction, text, output = self.makers[kind]()
            example = {"instruction": instruction, "input": text, "output": output, "kind": kind}
            if group_key(example) not in self.forbidden:
                made.setdefault((instruction, text), example)
        return list(made.values())

    # --- pieces -------------------------------------------------------------------------------

    def pick(self, *pools: Sequence[str]) -> str:
        return self.rng.choice(self.rng.choice(pools))

    def wording(self, kind: str, pattern: str = "") -> str:
        """A wording of the kind from the training examples that has the pattern."""
        while True:
            text = self.rng.choice(self.wordings[kind])
            if re.search(pattern, text):
                return text

    def list_of_words(self, low: int = 3, high: int = 6) -> list[str]:
        n = self.rng.randint(low, high)
        pool = self.rng.choice([ANIMALS, THINGS, JOBS, FOOD, PLACES, HE + SHE, NOUNS,
                                self.words, self.words, self.words])
        return self.rng.sample(pool, n)

    def subject(self) -> tuple[str, str, bool]:
        """A subject, its pronoun ("" where it is not sure), and whether it is plural."""
        kind = self.rng.choice(["name", "name", "man", "job", "job", "animal", "plural"])
        if kind == "name":
            he = self.rng.random() < 0.5
            return self.rng.choice(HE if he else SHE), "He" if he else "She", False
        if kind == "man":
            he = self.rng.random() < 0.5
            return "the " + self.rng.choice(MEN if he else WOMEN), "He" if he else "She", False
        if kind == "plural":
            noun = self.pick([n for n in NOUNS if n in ANIMALS or n in JOBS])
            return "the " + plural(noun), "They", True
        if kind == "animal":
            return "the " + self.described(self.rng.choice(ANIMALS)), "It", False
        return "the " + self.described(self.rng.choice(JOBS)), "", False

    def described(self, noun: str, often: float = 0.3) -> str:
        """The noun, sometimes with an adjective before it."""
        if self.rng.random() < often:
            return f"{self.rng.choice(ADJECTIVES)} {noun}"
        return noun

    def predicate(self) -> tuple[str, str]:
        """A verb, and what follows it."""
        sort = self.rng.choice(["thing", "thing", "food", "animal", "none"])
        where = self.where() if self.rng.random() < 0.6 or sort == "none" else ""
        if sort == "none":
            return self.rng.choice(WITHOUT), where
        verbs, pool = {"thing": (ON_THINGS, THINGS), "food": (ON_FOOD, FOOD),
                       "animal": (ON_ANIMALS, ANIMALS)}[sort]
        noun = self.described(self.rng.choice(pool))
        article = "the " if sort == "food" or self.rng.random() < 0.5 else ""
        thing = article + noun if article else a(noun)
        return self.rng.choice(verbs), f"{thing} {where}".strip()

    def where(self) -> str:
        preposition = self.rng.choice(["in", "in", "near", "behind", "by", "before"])
        return f"{preposition} the {self.described(self.rng.choice(PLACES), 0.2)}"

    def clause(self) -> tuple[str, str, str, str, bool]:
        """Subject, verb, rest, pronoun, plural."""
        subject, pronoun, many = self.subject()
        verb, rest = self.predicate()
        return subject, verb, rest, pronoun, many

    def sentence(self) -> str:
        subject, verb, rest, _, many = self.clause()
        form = self.rng.choice([past(verb), past(verb), verb if many else add_s(verb)])
        return f"{upper_first(subject)} {form} {rest}."

    # --- kinds: each returns instruction, input, output ----------------------------------------

    def make_list_item(self):
        instruction, items = self.wording("list_item"), self.list_of_words(4, 6)
        place, = re.findall("first|second|third|fourth|last", instruction)
        index = {"first": 0, "second": 1, "third": 2, "fourth": 3, "last": -1}[place]
        return instruction, ", ".join(items), items[index]

    def make_count(self):
        items = self.list_of_words(2, 7)
        return self.wording("count"), ", ".join(items), str(len(items))

    def make_order(self):
        instruction, items = self.wording("order"), self.list_of_words(3, 5)
        reverse = re.search("everse|around|last to first|backward|the end", instruction)
        return (instruction, ", ".join(items),
                ", ".join(items[::-1] if reverse else sorted(items, key=str.lower)))

    def make_format(self):
        instruction = self.wording("format")
        fields = self.fields(instruction)
        if fields:
            text, values = self.record()
            chosen = self.rng.sample(list(values), self.rng.randint(2, min(3, len(values))))
            return (self.with_fields(instruction, fields, chosen), text,
                    "\n".join(f"{field}: {values[field]}" for field in chosen))
        items = self.list_of_words(3, 5)
        if "dash" in instruction or '"- "' in instruction:
            output = "\n".join(f"- {item}" for item in items)
        elif "umber" in instruction or "1., 2." in instruction:
            output = "\n".join(f"{i}. {item}" for i, item in enumerate(items, start=1))
        else:
            output = joined(items)
        return instruction, ", ".join(items), output

    def make_json(self):
        instruction, (text, values) = self.wording("json"), self.record()
        chosen = self.rng.sample(list(values), self.rng.randint(2, min(3, len(values))))
        found = {f: int(values[f]) if values[f].isdigit() else values[f] for f in chosen}
        return (self.with_fields(instruction, self.fields(instruction), chosen), text,
                json.dumps(found))

    def fields(self, instruction: str) -> str:
        """The list of fields that the instruction names, as it stands there, or ""."""
        found = re.search(rf"\b{FIELD}(?:, {FIELD})*,? and {FIELD}\b", instruction)
        return found[0] if found else ""

    def with_fields(self, instruction: str, old: str, new: Sequence[str]) -> str:
        return instruction.replace(old, joined(new))

    def record(self) -> tuple[str, dict[str, str]]:
        """A sentence, and what it says as named fields."""
        v = {"name": self.pick(HE, SHE), "age": str(self.rng.randint(2, 60)),
             "town": self.pick(TOWNS), "job": self.pick(JOBS), "number": self.pick(NUMBERS),
             "thing": self.pick(THINGS), "colour": self.pick(COLOURS),
             "price": self.pick(NUMBERS), "animal": self.pick(ANIMALS),
             "relation": self.pick(RELATIONS), "day": self.pick(DAYS), "food": self.pick(FOOD),
             "children": self.pick(NUMBERS), "things": plural(self.pick(THINGS))}
        pattern = self.rng.choice(RECORDS)
        fields = re.findall(r"\{(\w+)\}", pattern)
        text = with_articles(pattern.format(**v))
        counted = all(len(re.findall(rf"\b{v[f]}\b", text)) == 1 for f in fields)
        return (upper_first(text), {f: v[f] for f in fields}) if counted else self.record()

    def make_replace(self):
        text = self.sentence()
        nouns = [w for w in re.findall(r"[a-z]+", text) if w in SORT and text.count(w) == 1]
        if not nouns:
            return self.make_replace()
        old = self.rng.choice(nouns)
        new = self.rng.choice([w for w in SORT[old] if w not in text
                               and (w[0] in "aeiou") == (old[0] in "aeiou")])
        instruction = self.wording("replace")
        old_first = re.match("Replace|Change|Take out", instruction)
        asked = quote(instruction, *((old, new) if old_first else (new, old)))
        return asked, text, text.replace(old, new)

    def make_add_word(self):
        text = self.sentence()
        nouns = [w for w in re.findall(r"(?<=the )[a-z]+", text)
                 if w in SORT and text.count(w) == 1]
        if not nouns:
            return self.make_add_word()
        noun, new = self.rng.choice(nouns), self.rng.choice(ADJECTIVES)
        return (quote(self.wording("add_word"), new, noun), text,
                text.replace(noun, f"{new} {noun}"))

    def make_tense(self):
        instruction = self.wording("tense")
        subject, verb, rest, _, many = self.clause()
        asked = re.search("past|yesterday", instruction)
        now = verb if many else add_s(verb)
        then = past(verb) if asked else f"will {verb}"
        start = upper_first(subject)
        return instruction, f"{start} {now} {rest}.", f"{start} {then} {rest}."

    def make_question(self):
        subject, verb, rest, _, many = self.clause()
        form = self.rng.choice(["now", "then", "then", "can", "will", "be"])
        start = upper_first(subject)
        if form == "be":
            auxiliary = self.rng.choice(["are", "were"] if many else ["is", "was"])
            state = self.rng.choice([self.rng.choice(ADJECTIVES), self.where()])
            return (self.wording("question"), f"{start} {auxiliary} {state}.",
                    f"{upper_first(auxiliary)} {subject} {state}?")
        said = {"now": verb if many else add_s(verb), "then": past(verb), "can": f"can {verb}",
                "will": f"will {verb}"}[form]
        auxiliary = {"now": "Do" if many else "Does", "then": "Did", "can": "Can",
                     "will": "Will"}[form]
        return (self.wording("question"), f"{start} {said} {rest}.",
                f"{auxiliary} {subject} {verb} {rest}?")

    def make_pronoun(self):
        subject, verb, rest, pronoun, many = self.clause()
        if not pronoun:
            return self.make_pronoun()
        said = self.rng.choice([past(verb), verb if many else add_s(verb)])
        return (self.wording("pronoun"), f"{upper_first(subject)} {said} {rest}.",
                f"{pronoun} {said} {rest}.")

    def make_grammar(self):
        subject, verb, rest, pronoun, many = self.clause()
        start = upper_first(self.rng.choice([subject, pronoun or subject]))
        mistake = self.rng.choice(["agreement", "past", "article", "be"])
        if mistake == "agreement":
            right, wrong = (verb, add_s(verb)) if many else (add_s(verb), verb)
        elif mistake == "past":
            verb = self.rng.choice(WRONG_PAST)
            noun = self.rng.choice(FOOD if verb == "eat" else THINGS)
            rest = f"the {self.described(noun)}"
            right, wrong = past(verb), verb + ("d" if verb.endswith("e") else "ed")
        elif mistake == "article":
            noun = self.described(self.rng.choice(THINGS))
            verb = self.rng.choice(ON_THINGS)
            right = f"{past(verb)} {a(noun)}"
            wrong = f"{past(verb)} {'a' if a(noun).startswith('an ') else 'an'} {noun}"
            rest = self.where()
        else:
            right, wrong = ("are", "is") if many else ("is", "are")
            if self.rng.random() < 0.5:
                right, wrong = ("were", "was") if many else ("was", "were")
            rest = self.rng.choice([self.rng.choice(ADJECTIVES), self.where()])
        return self.wording("grammar"), f"{start} {wrong} {rest}.", f"{start} {right} {rest}."

    def make_plural(self):
        many = self.rng.random() < 0.5
        pattern = "words|each|every|plurals"
        instruction = self.wording("plural", pattern if many else f"^(?!.*({pattern}))")
        nouns = self.rng.sample(NOUNS, 2 if many else 1)
        return instruction, ", ".join(nouns), ", ".join(map(plural, nouns))

    def make_letters(self):
        sort = self.rng.choice(["first", "begins", "begins", "rhyme"])
        if sort == "first":
            word = self.pick(NOUNS, self.words)
            return self.wording("letters", "first letter|Write the letter|With which|first letter,"
                                ), word, word[0]
        if sort == "rhyme":
            row, other, third = self.rng.sample(RHYMES, 3)
            word, right = self.rng.sample(row, 2)
            choices = [right, self.rng.choice(other), self.rng.choice(third)]
            self.rng.shuffle(choices)
            return self.wording("letters", "rhyme|sounds"), f"{word}: {', '.join(choices)}", right
        items = self.list_of_words(3, 5)
        item = self.rng.choice(items)
        letter = item[0].lower()
        if [w[0].lower() for w in items].count(letter) > 1:
            return self.make_letters()
        instruction = re.sub(r"\b[a-z](?=\.|\?|$)", letter,
                             self.wording("letters", r"\b[a-z](\.|\?|\. Which\?)$"))
        return instruction, ", ".join(items), item

    def make_arithmetic(self):
        instruction = self.wording("arithmetic", r"\d")
        i, j = self.rng.randint(1, 12), self.rng.randint(1, 12)
        less = re.search(r" - |minus|Take|Subtract|gave away|takes out|lost", instruction)
        x, y, answer = (i + j, i, j) if less else (i, j, i + j)
        if answer > 20 or x > 20:
            return self.make_arithmetic()
        first, second = (y, x) if instruction.startswith(("Take", "Subtract")) else (x, y)
        places = iter((str(first), str(second)))
        return re.sub(r"\d+", lambda _: next(places), instruction), "", str(answer)

    def make_sequence(self):
        start, step = self.rng.randint(1, 90), self.rng.choice([1, 1, 2, 3, 4, 5, 10, -1, -2])
        items = [start + i * step for i in range(5)]
        if min(items) < 0:
            return self.make_sequence()
        return (self.wording("sequence", "^(?!.*(day|month))"), ", ".join(map(str, items[:4])),
                str(items[4]))

    def make_category(self):
        name, pool = self.rng.choice([("animal", ANIMALS), ("plant", PLANTS), ("thing", THINGS),
                                      ("person", JOBS + MEN + WOMEN)])
        noun = self.described(self.rng.choice(pool), 0.3)
        return self.wording("category"), self.rng.choice([a(noun), f"the {noun}"]), name

    def make_extract(self):
        parts = {"day": self.pick(DAYS), "animal": self.pick(ANIMALS), "place": self.pick(PLACES),
                 "name": self.pick(HE, SHE), "food": self.pick(FOOD), "colour": self.pick(COLOURS),
                 "number": self.pick(NUMBERS), "job": self.pick(JOBS), "thing": self.pick(THINGS)}
        sort = self.rng.choice(["animal", "place", "name", "food", "colour", "number", "day"])
        names = {"animal": "animal", "place": "place", "name": "name of|named|person",
                 "food": "food|eat", "colour": "colour", "number": "number", "day": "day"}
        pattern = self.rng.choice([p for p in EXTRACTS if "{" + sort in p])
        thing, preposition = parts["thing"], self.rng.choice(["in", "near", "behind"])
        text = pattern.format(**parts, animals=plural(parts["animal"]), things=plural(thing),
                              thing_past=past(self.rng.choice(ON_THINGS)),
                              food_past=past(self.rng.choice(ON_FOOD)), prep=preposition,
                              animal_past=past(self.rng.choice(ON_ANIMALS)),
                              without_past=past(self.rng.choice(WITHOUT)))
        text = with_articles(text)
        if len(re.findall(rf"\b{parts[sort]}\b", text)) != 1:
            return self.make_extract()
        return self.wording("extract", names[sort]), upper_first(text), parts[sort]

    # --- passages -----------------------------------------------------------------------------

    def facts(self) -> list[tuple[str, list[tuple[str, str]], list[str]]]:
        """Sentences about different things, each with questions, and questions it leaves open."""
        r, where = self.rng, [self.where() for _ in range(6)]
        name, other, third = r.sample(HE + SHE, 3)
        he, his = ("he", "his") if third in HE else ("she", "her")
        job, job2, job3 = r.sample(JOBS, 3)
        animal, animal2 = r.sample([x for x in NOUNS if x in ANIMALS], 2)
        thing, thing2, thing3 = r.sample(THINGS, 3)
        colour, number, number2 = r.choice(COLOURS), *r.sample(NUMBERS, 2)
        day, town, food = r.choice(DAYS), r.choice(TOWNS), r.choice(FOOD)
        verb, verb2 = r.sample(ON_THINGS, 2)
        eat, material, adjective = r.choice(ON_FOOD), r.choice(MATERIALS), r.choice(ADJECTIVES)
        time = r.choice(["in the morning", "at noon", "at midnight", "in the evening", "at dawn",
                         "after supper", "before sunrise", f"on {day}", "in spring", "in winter"])
        return [
            (f"{name} {past(verb)} {a(colour)} {thing} {where[0]}.",
             [(f"What did {name} {verb}?", f"{a(colour)} {thing}"),
              (f"Where did {name} {verb} the {thing}?", where[0]),
              (f"Who {past(verb)} the {thing}?", name),
              (f"What colour was the {thing}?", colour)],
             [f"When did {name} {verb} the {thing}?", f"How much did the {thing} cost?"]),
            (f"On {day} the {job} came to {town}.",
             [(f"Who came to {town}?", f"the {job}"), (f"When did the {job} come?", f"on {day}"),
              (f"On what day did the {job} come to {town}?", day),
              (f"To which town did the {job} come?", town)],
             [f"What was the name of the {job}?", f"How old was the {job}?"]),
            (f"{other} kept {number} {plural(animal)} {where[1]}.",
             [(f"How many {plural(animal)} did {other} keep?", number),
              (f"Where did {other} keep the {plural(animal)}?", where[1]),
              (f"Who kept the {plural(animal)}?", other),
              (f"What did {other} keep {where[1]}?", f"{number} {plural(animal)}")],
             [f"What colour were the {plural(animal)}?",
              f"Who gave {other} the {plural(animal)}?"]),
            (f"The {job2} had {a(animal2)} named {third}.",
             [(f"What was the name of the {animal2}?", third),
              (f"Who had {a(animal2)}?", f"the {job2}"),
              (f"What animal did the {job2} have?", a(animal2))],
             [f"What was the name of the {job2}?", f"How old was the {animal2}?"]),
            (f"{upper_first(time)} the {job3} {past(eat)} the {food} {where[2]}.",
             [(f"When did the {job3} {eat} the {food}?", time),
              (f"Who {past(eat)} the {food}?", f"the {job3}"),
              (f"What did the {job3} {eat}?", f"the {food}"),
              (f"Where did the {job3} {eat} the {food}?", where[2])],
             [f"Who cooked the {food}?", f"What was the name of the {job3}?"]),
            (f"The {thing2} was made of {material} and stood {where[3]}.",
             [(f"What was the {thing2} made of?", material),
              (f"Where did the {thing2} stand?", where[3]),
              (f"What stood {where[3]}?", f"the {thing2}")],
             [f"Who made the {thing2}?", f"How old was the {thing2}?"]),
            (f"{third} sold {his} {thing3} for {number2} coins and went home {time}.",
             [(f"For how many coins did {he} sell the {thing3}?", number2),
              (f"What did {third} sell?", f"{his} {thing3}"), (f"Who sold the {thing3}?", third),
              (f"When did {third} go home?", time)],
             [f"Who bought the {thing3}?", f"What colour was the {thing3}?"]),
            (f"{upper_first(a(adjective))} {job} lived {where[4]}.",
             [(f"Who lived {where[4]}?", f"{a(adjective)} {job}"),
              (f"Where did the {job} live?", where[4])],
             [f"How long did the {job} live there?", f"What was the name of the {job}?"]),
            (f"The {animal} {past('chase')} the {animal2} {where[5]}.",
             [(f"What did the {animal} chase?", f"the {animal2}"),
              (f"Where did the {animal} chase the {animal2}?", where[5])],
             [f"When did the {animal} chase the {animal2}?", f"Who saw the {animal}?"]),
        ]

    def passage(self) -> tuple[str, list[tuple[str, str]], list[str]]:
        """Two to four sentences, the questions that they answer, and some that they do not."""
        chosen = self.rng.sample(self.facts(), self.rng.randint(2, 4))
        text = " ".join(sentence for sentence, _, _ in chosen)
        pairs = [(q, x) for _, answered, _ in chosen for q, x in answered
                 if len(re.findall(rf"(?<!\w){x}(?!\w)", text, re.I)) >= 1]
        return text, pairs, [q for _, _, left_open in chosen for q in left_open]

    def make_passage_qa(self):
        text, pairs, _ = self.passage()
        question, answer = self.rng.choice(pairs)
        return self.rng.choice(QA).format(question), text, answer

    def make_qa_not_said(self):
        text, pairs, left_open = self.passage()
        question, answer = self.rng.choice(pairs)
        if self.rng.random() < 0.5:
            question, answer = self.rng.choice(left_open), "not said"
        return self.rng.choice(NOT_SAID).format(question), text, answer


def quote(instruction: str, *new: str) -> str:
    """The instruction with other words between its quotation marks."""
    words = iter(new)
    return re.sub(r'"[^"]*"', lambda _: f'"{next(words)}"', instruction)


SORT = {word: pool for pool in (ANIMALS, THINGS, JOBS, FOOD, PLACES) for word in pool}
RECORDS = [
    "{name} the {job} lives in {town}.", "the {job} of {town} is called {name}.",
    "{name}, who is {age}, keeps a {animal}.", "on {day} {name} bought a {colour} {thing}.",
    "{name} paid {price} pence for the {thing}.", "the {animal} ate all the {food} on {day}.",
    "my {relation} {name} moved to {town}.", "{name} has {number} {things} and a {animal}.",
    "a {job} sold {number} {things} in {town}.", "the {colour} {animal} belongs to {name}.",
    "{name} is a {job} and has {children} children.", "at the age of {age} {name} left {town}.",
    "there were {number} {things} in the cart of the {job}.", "the {job} likes {food} best.",
    "his {relation} is a {job} in {town}.", "her {relation} {name} is {age} years old.",
    "{name} cooked {food} for the {job} on {day}.", "a {colour} {thing} costs {price} shillings.",
    "the {animal} of the {job} is {age} years old.",
    "{name} found a {thing} and {number} {things}.", "every {day} the {job} rides to {town}.",
    "{name} traded a {animal} for some {food}."]
EXTRACTS = [
    "on {day} the {animal} {without_past} {prep} the {place}.",
    "{name} {food_past} the {food} {prep} the {place}.",
    "{number} {things} lay {prep} the {place}.", "the {job} {thing_past} a {colour} {thing}.",
    "{name} {animal_past} the {animal} on {day}.", "the {job} {food_past} some {food} on {day}.",
    "a {colour} {thing} stood {prep} the {place}.", "the {animal} ate the {food}.",
    "{name} has {number} {things}.", "the {colour} {animal} {without_past} {prep} the {place}.",
    "{number} people {animal_past} the {animal}.", "{name} {thing_past} the {colour} {thing}.",
    "the {job} and {name} {without_past} {prep} the {place}.",
    "they {thing_past} {number} {things} on {day}.",
    "on {day} {name} {food_past} the {food}.", "the {animal} {animal_past} the {job}."]


def copy_words(tokenizer) -> list[str]:
    """Words of lower-case letters that are one token: a wide vocabulary to copy."""
    texts = (tokenizer.decode([i]) for i in range(tokenizer.n_vocab - 1))
    return sorted({t[1:] for t in texts if re.fullmatch(r" [a-z]{3,}", t)})


def generate_examples(n: int, seed: int = 0, words: Sequence[str] = ()) -> list[Example]:
    """n examples; see `Generator`."""
    return Generator(seed, words)(n)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--n", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    examples = generate_examples(options.n, options.seed)
    options.out.write_text(json.dumps(examples, indent=1) + "\n", encoding="utf-8")
    print(len(examples), "examples")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
