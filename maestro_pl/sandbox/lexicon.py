"""The small vocabulary of the sandbox: every name, thing, topic and phrase that its prompts and answers are made of."""

from __future__ import annotations

NAMES = (
    "Tom", "Mia", "Ben", "Ana", "Leo", "Zoe", "Sam", "Eva", "Max", "Lily", "Finn", "Nora",
    "Jack", "Ruby", "Omar", "Ella", "Hugo", "Iris", "Noah", "Maya", "Adam", "Rosa", "Theo", "Jane",
)  # fmt: skip

OBJECTS = ("apples", "coins", "books", "shells", "cards", "eggs", "pens", "stones", "cakes", "stars")

#: Brainstorm topics: the three stock ideas everybody has, and the fresh ones.
IDEAS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    topic: (tuple(stock.split()), tuple(fresh.split()))
    for topic, stock, fresh in (
        (
            "picnic",
            "bread water blanket",
            "lemonade cherries kite guitar olives pancakes dominoes melon cushions honey sandwiches grapes juice radio",
        ),
        (
            "camping",
            "tent torch matches",
            "lantern compass hammock whistle rope binoculars kettle map "
            "boots harmonica marshmallows axe thermos headlamp",
        ),
        (
            "kitchen",
            "pot pan spoon",
            "whisk grater sieve apron ladle mortar timer funnel peeler wok toaster jars scales teapot",
        ),
        (
            "garden",
            "flowers grass spade",
            "pond trellis compost beehive swing herbs fountain ladybirds pergola sundial gnome bench ferns birdbath",
        ),
        (
            "party",
            "cake drinks music",
            "lanterns magician karaoke confetti pinata masks bubbles quiz "
            "juggler fireworks balloons costumes disco charades",
        ),
        (
            "beach",
            "towel bucket ball",
            "snorkel parasol sandals frisbee goggles surfboard sunhat mangoes "
            "canoe novel seashells volleyball popsicles flippers",
        ),
        (
            "school",
            "paper pencil bag",
            "microscope globe abacus atlas chessboard telescope magnets easel "
            "clay terrarium crayons violin poster encyclopedia",
        ),
        (
            "winter",
            "coat hat gloves",
            "sledge cocoa skates candles scarf puzzles sauna igloo "
            "knitting gingerbread snowman fireplace cinnamon earmuffs",
        ),
    )
}

#: Reply acts: what the friend says, the stock reply, and the fresh words that fit.
ACTS: dict[str, tuple[tuple[str, ...], str, tuple[str, ...]]] = {
    "praise": (
        ("I passed my exam", "I won the race", "I got the job", "I learned to swim", "I finished my novel"),
        "that is good",
        ("bravo", "hooray", "superb", "brilliant", "splendid", "marvellous", "champion", "dazzling"),
    ),
    "comfort": (
        ("I lost my keys", "my dog is ill", "I failed the test", "I broke my arm", "my trip was cancelled"),
        "that is bad",
        ("courage", "hugs", "hang on", "chin up", "poor you", "stay strong", "deep breath", "cheer up"),
    ),
    "thanks": (
        ("I fixed your bike", "I baked you a pie", "I fed your cat", "I saved you a seat", "I washed your car"),
        "thank you",
        ("legend", "lifesaver", "angel", "much obliged", "so grateful", "cheers", "bless you", "hero"),
    ),
    "farewell": (
        ("I am off to Rome", "I leave at noon", "my train is here", "I move to Peru", "I must go home"),
        "good bye",
        ("safe travels", "see you", "farewell", "write soon", "take care", "bon voyage", "ciao", "until then"),
    ),
}

#: Explain topics: the facts that a full explanation gives, in order.
FACTS: dict[str, tuple[str, str, str, str]] = {
    "rain": (
        "the sun warms the sea",
        "damp air rises and cools",
        "tiny drops gather in clouds",
        "heavy drops fall to earth",
    ),
    "bread": (
        "flour is mixed with water",
        "yeast eats sugar and breathes gas",
        "the gas lifts the dough",
        "heat makes the crust hard",
    ),
    "sleep": (
        "the brain grows tired by evening",
        "darkness calls for a hormone",
        "the body slows and mends",
        "memories are sorted at night",
    ),
    "bees": (
        "bees visit flowers for nectar",
        "pollen sticks to their legs",
        "it reaches the next flower",
        "seeds and fruit then grow",
    ),
    "tides": (
        "the moon pulls on the ocean",
        "water bulges towards it",
        "the earth turns below the bulge",
        "so the shore floods twice daily",
    ),
    "echoes": (
        "sound travels through air as waves",
        "a wall throws the waves back",
        "they return to the ear",
        "far walls make long delays",
    ),
    "ships": (
        "a hull pushes water aside",
        "the water pushes back up",
        "hollow shapes weigh less inside",
        "so even steel can float",
    ),
    "magnets": (
        "iron holds many small regions",
        "a magnet lines them up",
        "opposite poles attract each other",
        "equal poles drive apart",
    ),
}

#: Colourful words that mean nothing here: they make a text rich without making it right.
COLOURS = (
    "lovely", "golden", "quiet", "curious", "gentle", "bright", "dreamy", "velvet", "ancient", "playful", "silver",
    "tender", "wild", "mellow", "radiant", "merry", "misty", "noble", "rosy", "secret", "shiny", "sweet", "vivid", "witty",
)  # fmt: skip
THINGS = (
    "morning", "garden gate", "melody", "journey", "river", "rainbow", "story", "feather", "window", "meadow", "candle",
    "harbour", "island", "shadow", "whisper", "village", "orchard", "mirror", "bridge", "dream",
)  # fmt: skip

#: What a long reply goes on with, always in this order.
POLITE = (
    "i read what you told me and thought about it",
    "i hope that all is well with your family",
    "we should meet again one day soon",
    "please tell everybody that i said so",
)
