"""Words for training and evaluating the bundled model.

Words are lower-case a-z with three to eight letters: common English words, pronounceable invented words, repetitive
ones and plain letter strings. A hash of the word alone decides whether it belongs to the training, the validation or
the held-out test split, so the splits are disjoint by construction, whatever the seed.
"""

from __future__ import annotations

import hashlib
import random

MIN_LETTERS = 3
MAX_LETTERS = 8
VOWELS = "aeiou"
DEMO_WORDS = ("banana", "pomona", "orchard", "cider", "harvest")

COMMON_WORDS: tuple[str, ...] = tuple(
    """
    able about above acid across actor adult after again agent agree ahead alarm album alive allow almost alone along
    also always amber among amount anchor angel anger angle animal ankle answer apple april apron arch area argue arm
    army around arrive arrow art ask aunt autumn avenue awake away baby back bacon badge bag bake baker balance ball
    bamboo band bank bar bark barn barrel base basket bath beach beads bean bear beard beast beauty become bed beef
    before begin behind belief bell below belt bench berry best better between beyond bicycle big bird birth biscuit
    bitter black blanket blaze blossom blue board boat body boil bold bone bonus book boot border borrow bottle bottom
    bounce bowl box branch brave bread break breeze brick bridge bright bring broad bronze brother brown brush bubble
    bucket budget build bundle burn bus butter button buyer cabin cable cake call camel camera camp candle canyon
    carbon card care carpet carrot carry castle cat catch cause cave cellar center century cereal chain chair chalk
    chance change chapter charm cheap cheese cherry chess chest chicken child choice circle city clay clean clear
    clever climb clock close cloth cloud clover coach coast coat coconut coffee coin cold color comb comet common
    compass cook copper coral corn corner cotton couch count country cousin cover crab cradle crane cream create
    credit cricket crisp crowd crown cruise crystal culture cup curtain cushion custom cycle dairy daisy damp dance
    danger daring dark data dawn day deal decade deep deer degree delight deliver demand depth desert design desk
    diamond dinner direct dish distant doctor dog dollar dolphin door double dragon drama draw dream dress drink drive
    drum duck dust duty eagle early earth east easy echo edge edit effort egg eight elbow elegant empty energy engine
    enjoy enough entire equal escape evening event exact example expert extra eye fabric face fact fair faith fall
    family famous fancy farm farmer fast father feather fence ferry fever field fig final finger fire first fish five
    flag flame flash flight float floor flour flower flute fly foam focus fog follow food forest forget fork forty
    forward fossil fountain fox frame free fresh friend frog front frost fruit fuel funny future galaxy game garage
    garden garlic gate gather gentle ghost giant gift ginger giraffe give glad glass globe glove goal goat gold golden
    good grain grand grape grass gravity gray great green grocery ground group grow guard guess guest guide guitar
    habit hair half hall hammer hand happy harbor hard hat hawk hazel head health heart heavy hedge height helmet help
    hero hidden high hill history hobby holiday hollow home honest honey hope horizon horse hotel hour house human
    humble hundred hunger hurry ice idea igloo image inch indigo ink insect inside island ivory jacket jam jar jazz
    jelly jewel join joke journey joy judge juice jump jungle junior just kettle key kind king kitchen kite kitten
    knee knife ladder lady lake lamp land lantern large last laugh lava lawn layer leaf learn leather left legend
    lemon lesson letter level library life light lily lime line lion liquid list little lizard lobster local long
    lotus loud love lucky lunch machine magic magnet main major mango maple marble march market mask master match
    meadow meal medal melody melon memory mercy metal middle milk mill mind minute mirror mist mixture model modern
    moment money monkey month moon morning moss mother motor mountain mouse music mustard name napkin narrow nature
    near nectar needle neither nephew nest never new night nine noble noise north nose notebook notice number nut
    oak oasis ocean october office olive onion open opera orange orbit orchid order organ origin otter outside oven
    owl owner oxygen oyster paint pair palace palm panda panel paper parade parent park parrot party past pasta path
    patient pause peace peach peanut pear pebble pencil penguin people pepper perfect person phone photo piano picnic
    picture piece pigeon pillow pilot pine pink pirate pizza place plain planet plant plate player plenty plum pocket
    poem point polar pond pony poppy portrait potato powder power prairie press price pride prince print prize
    problem promise proud pudding pulse pumpkin puppy purple puzzle quality quarter queen quick quiet quilt rabbit
    radio rain rainbow ranch rapid raven reason recipe record red reef regular relax remote repeat rescue rest result
    return reward rhythm ribbon rice rich riddle ring ripe river road robin robot rock rocket roof room root rope rose
    rough round royal ruby rural sail salad salmon salt sand sapling satin sauce scale scarf school science scout sea
    season seat second secret seed sense seven shadow shape share sharp sheep shelf shell shine ship shirt shore short
    shoulder silence silk silver simple singer sister six sketch skill sky sleep slice slow small smart smile smoke
    smooth snail snow soap soccer social soft soil solar soldier solid song sound soup south space spark special
    speed spice spider spinach spirit spoon sport spring square squirrel stable stage stair star station steam steel
    stem step stick stone storm story stove stream street strong student sugar summer sun sunset supper surface swan
    sweet swim symbol table talent tall tango target taste teacher team temple tennis tent texture thank theory thick
    thin third thorn thread three thunder ticket tide tiger timber time tiny toast today together tomato tone tool
    tooth torch total touch tower town trade train travel treasure tree triangle trip trout truck trumpet trust truth
    tulip tunnel turkey turtle twelve twenty twist umbrella uncle under unit upper urban useful valley value vanilla
    velvet verse very video village vine violet violin visit vivid voice volcano voyage wagon waiter walk wall walnut
    warm wash watch water wave wealth weather week west whale wheat wheel whisper white wide wild willow wind window
    wine wing winter wisdom wise wolf wonder wood wool word work world worthy write yacht yard year yellow yogurt
    young zebra zero zigzag zone
    """.split()
)

_ONSETS = (
    "b c d f g h j k l m n p r s t v w y z b d f g l m n p r s t br ch cl cr dr fl fr gl gr pl pr qu sh sl sp st th "
    "tr wh"
).split()
_ONSETS += ["", "", ""]
_NUCLEI = "a e i o u a e i o u ai ea ee oa oo ou io".split()
_CODAS = ["", "", "", "", "", *"b d g k l m n p r s t x ck ff ll nd ng nt rd rn sh ss st th".split()]


def split_of(word: str) -> str:
    """The split a word belongs to: "train", "validation" or "test"; depends on the word only."""
    if word in DEMO_WORDS:
        return "test"
    bucket = int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "big") % 20
    if bucket < 2:
        return "test"
    return "validation" if bucket == 2 else "train"


def _invented_word(rng: random.Random) -> str:
    word = ""
    target = rng.randint(MIN_LETTERS, MAX_LETTERS)
    while len(word) < target:
        word += rng.choice(_ONSETS) + rng.choice(_NUCLEI) + rng.choice(_CODAS)
    return word[:target]


def _letter_string(rng: random.Random) -> str:
    return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(MIN_LETTERS, MAX_LETTERS)))


def _repetitive_word(rng: random.Random) -> str:
    """Few different letters, often in a repeated pattern (as in "banana"): the hard case for copying in any order."""
    target = rng.randint(MIN_LETTERS + 1, MAX_LETTERS)
    if rng.random() < 0.5:
        return "".join(rng.choices(_invented_word(rng)[:4], k=target))
    pattern = _invented_word(rng)[: rng.randint(2, 3)]
    start = rng.choice(["", rng.choice("bcdfghklmnprstvwyz")])
    return (start + pattern * MAX_LETTERS)[:target]


def is_usable(word: str) -> bool:
    """Three to eight letters, with at least one consonant (so that no task has an empty answer)."""
    return MIN_LETTERS <= len(word) <= MAX_LETTERS and any(letter not in VOWELS for letter in word)


def draw_word(rng: random.Random, split: str, letter_strings: float = 0.3) -> str:
    """A random word of one split: common, repetitive, a share of plain letter strings, the rest invented."""
    while True:
        dice = rng.random()
        if dice < 0.15:
            word = rng.choice(COMMON_WORDS)
        elif dice < 0.15 + letter_strings:
            word = _letter_string(rng)
        elif dice < 0.15 + letter_strings + 0.2:
            word = _repetitive_word(rng)
        else:
            word = _invented_word(rng)
        if is_usable(word) and split_of(word) == split:
            return word


def held_out_words(count: int, seed: int) -> list[str]:
    """Distinct test words: the demo words, up to ``count // 2`` held-out common words, the rest invented words."""
    rng = random.Random(seed)
    common = [word for word in COMMON_WORDS if is_usable(word) and split_of(word) == "test" and word not in DEMO_WORDS]
    rng.shuffle(common)
    words = [*DEMO_WORDS, *common[: count // 2]]
    while len(words) < count:
        word = draw_word(rng, "test", letter_strings=0.0)
        if word not in words:
            words.append(word)
    return words[:count]
