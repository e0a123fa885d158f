"""Closed word lists and sentence patterns of the synthetic sample.

Everything here was made up for this project: the people do not exist, the drug names are invented,
and no dose means anything.
"""

from __future__ import annotations

FIRST_NAMES: tuple[str, ...] = tuple(
    (
        "Anna Boris Clara David Elena Felix Greta Henry Irene Jonas Karen Lukas Maria Nina Oscar "
        "Paula Robert Sofia Thomas Vera Walter Yusuf Zoe Amir"
    ).split()
)

LAST_NAMES: tuple[str, ...] = tuple(
    (
        "Alder Berg Castle Draper Egan Fisher Grove Holt Ivory Jansen Keller Lowe Marsh Norden "
        "Osborn Porter Quinn Rossi Stone Tanaka Underhill Vogel Winter Yates"
    ).split()
)

DRUGS: tuple[str, ...] = tuple(
    (
        "Avelorin Bractazol Cormidal Dexlumin Ervastil Fenorol Galtrexin Hapromil Ixolane "
        "Jervadin Kelpraxin Lumizol Morvatin Nolextra Ostrifen Pravolex Quilamine Rondacil "
        "Sorbexin Tilmodrin"
    ).split()
)

# The last few names and drugs never occur in the adapter's training sample: a right note about
# them was read from the conversation, not remembered.
HELD_OUT_COUNT = 4

DOSES: tuple[str, ...] = tuple(
    (
        "5 mg|10 mg|15 mg|20 mg|25 mg|30 mg|40 mg|50 mg|75 mg|100 mg|150 mg|200 mg|250 mg|300 mg|"
        "400 mg|500 mg"
    ).split("|")
)

FREQUENCIES: tuple[str, ...] = (
    "once a day",
    "twice a day",
    "three times a day",
    "every morning",
    "every evening",
    "every six hours",
)

DURATIONS: tuple[str, ...] = tuple(
    (
        "3 days|4 days|5 days|6 days|7 days|8 days|10 days|12 days|14 days|3 weeks|4 weeks|6 weeks"
    ).split("|")
)

COMPLAINTS: tuple[str, ...] = tuple(
    (
        "a sore throat|a dry cough|back pain|knee pain|a headache|an earache|a skin rash|"
        "stomach pain|heartburn|a runny nose|dizziness|a stiff neck|itchy eyes|a swollen ankle|"
        "a toothache|muscle cramps|hip pain|shoulder pain|hay fever|nausea"
    ).split("|")
)

ONSETS: tuple[str, ...] = tuple(
    "two days|three days|four days|five days|a week|two weeks|three weeks|a month|two months".split(
        "|"
    )
)

ALLERGIES: tuple[str, ...] = tuple(
    "none none none penicillin aspirin latex peanuts eggs pollen nickel shellfish".split()
)

FOLLOW_UPS: tuple[str, ...] = tuple(
    "one week|two weeks|three weeks|ten days|one month|two months".split("|")
)

AGES: tuple[int, ...] = tuple(range(18, 86))

ASK_NAME: tuple[str, ...] = (
    "Hello, what is your name?",
    "Good morning. Please tell me your name.",
    "Hi, can I take your name?",
    "Welcome. Who are you, please?",
)
TELL_NAME: tuple[str, ...] = ("I am {name}.", "My name is {name}.", "It is {name}.", "{name}.")

ASK_AGE: tuple[str, ...] = ("How old are you?", "And your age?", "What is your age, please?")
TELL_AGE: tuple[str, ...] = ("I am {age}.", "{age} years old.", "I turned {age} this year.")
TELL_NAME_AND_AGE: tuple[str, ...] = (
    "I am {name} and I am {age}.",
    "My name is {name}, I am {age} years old.",
    "{name}, {age}.",
)

ASK_COMPLAINT: tuple[str, ...] = (
    "What brings you here today?",
    "What can I do for you?",
    "How can I help?",
    "What is the problem?",
)
TELL_COMPLAINT: tuple[str, ...] = (
    "I have had {complaint} for {onset}.",
    "For {onset} now I have {complaint}.",
    "It is {complaint}. I have had it for {onset}.",
    "I have {complaint}, for {onset} already.",
)

ASK_ALLERGY: tuple[str, ...] = (
    "Do you have any allergies?",
    "Any allergies?",
    "Are you allergic to anything?",
)
TELL_ALLERGY: tuple[str, ...] = (
    "Yes, to {allergy}.",
    "I am allergic to {allergy}.",
    "Only {allergy}.",
)
TELL_NO_ALLERGY: tuple[str, ...] = ("No, none.", "None that I know of.", "No allergies.")

PRESCRIBE: tuple[str, ...] = (
    "Please take {drug} {dose} {frequency} for {duration}.",
    "I will give you {drug}, {dose} {frequency}, for {duration}.",
    "We start {drug} {dose}. Take it {frequency} for {duration}.",
    "Take {drug} for {duration}, {dose} {frequency}.",
)
PRESCRIBE_SHORT: tuple[str, ...] = (
    "I will give you {drug}, {dose} {frequency}.",
    "Please take {drug} {dose} {frequency}.",
    "Let us try {drug}. Take {dose} {frequency}.",
)
ASK_HOW_LONG: tuple[str, ...] = ("For how long?", "How long do I take it?")
TELL_HOW_LONG: tuple[str, ...] = ("For {duration}.", "Take it for {duration}.")

FOLLOW_UP: tuple[str, ...] = (
    "Come back in {follow_up}.",
    "I want to see you again in {follow_up}.",
    "See me in {follow_up}.",
)
AGREE: tuple[str, ...] = ("Okay.", "All right.", "I will do that.")
THANK: tuple[str, ...] = ("Thank you, doctor.", "Thanks.", "Thank you. Goodbye.")
