"""Writes the instruction set of this folder: `train.jsonl` and `heldout.jsonl`.

    python docs/finetuning/examples.py

Ten small tasks, each answered by one line of JSON with the fields `answer` and `about`, for which
no instruction asks: it is to be learnt. The held-out part has other facts and other words of
asking. Facts and words were written for this project; which are drawn, a seed decides.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
TRAIN, HELDOUT = 36, 6  # examples a task

CAPITALS = """France Paris, Italy Rome, Spain Madrid, Japan Tokyo, Egypt Cairo, Norway Oslo,
Greece Athens, Austria Vienna, Poland Warsaw, Russia Moscow, China Beijing, Cuba Havana, Peru
Lima, Chile Santiago, Kenya Nairobi, Iran Tehran, Iraq Baghdad, Turkey Ankara, Hungary Budapest,
Sweden Stockholm, Finland Helsinki, Denmark Copenhagen, Ireland Dublin, Portugal Lisbon, Belgium
Brussels, Thailand Bangkok, Vietnam Hanoi, Canada Ottawa, Australia Canberra, Argentina
Buenos_Aires, Colombia Bogota, Ukraine Kyiv, Romania Bucharest, Bulgaria Sofia, Serbia Belgrade,
Croatia Zagreb, Germany Berlin, India New_Delhi, Indonesia Jakarta, Mexico Mexico_City, Ghana
Accra, Nigeria Abuja, Ethiopia Addis_Ababa, Syria Damascus, Lebanon Beirut, Jordan Amman, Nepal
Kathmandu, Iceland Reykjavik"""
OPPOSITES = """hot cold, big small, fast slow, old young, up down, left right, day night, open
closed, full empty, rich poor, happy sad, light dark, hard soft, wet dry, early late, high low,
strong weak, thick thin, near far, loud quiet, clean dirty, deep shallow, wide narrow, long short,
first last, true false, good bad, alive dead, sweet sour, heavy light, inside outside, begin end,
win lose, buy sell, push pull, love hate, rise fall, give take, friend enemy, question answer,
always never, above below, rough smooth, cheap expensive, brave afraid, asleep awake, major minor,
maximum minimum"""
PLURALS = """cat cats, box boxes, city cities, leaf leaves, child children, mouse mice, tooth
teeth, foot feet, man men, woman women, sheep sheep, knife knives, wolf wolves, berry berries, bus
buses, dish dishes, dog dogs, house houses, potato potatoes, hero heroes, party parties, story
stories, baby babies, lady ladies, glass glasses, watch watches, church churches, key keys, day
days, toy toys, book books, tree trees, shelf shelves, wife wives, life lives, loaf loaves, goose
geese, ox oxen, fly flies, country countries, brush brushes, fox foxes, tomato tomatoes, half
halves, photo photos, monkey monkeys, penny pennies, bench benches"""
KINDS = """dog animal, cat animal, horse animal, eagle animal, salmon animal, rabbit animal, tiger
animal, whale animal, frog animal, bee animal, cow animal, sheep animal, hammer tool, saw tool,
drill tool, spade tool, wrench tool, screwdriver tool, axe tool, chisel tool, rake tool, pliers
tool, shovel tool, file tool, oak plant, rose plant, tulip plant, fern plant, grass plant, cactus
plant, pine plant, moss plant, ivy plant, daisy plant, maple plant, clover plant, lion animal,
goat animal, duck animal, willow plant, lily plant, birch plant, ladder tool, trowel tool, crowbar
tool, wolf animal, elm plant, scissors tool"""
COLOURS = """grass green, blood red, snow white, coal black, sky blue, lemon yellow, milk white,
tar black, leaf green, sun yellow, chocolate brown, salt white, tomato red, cucumber green, crow
black, banana yellow, strawberry red, cherry red, cotton white, lime green, egg_yolk yellow, earth
brown, pea green, fire_engine red, swan white, raven black, canary yellow, ruby red, emerald
green, sapphire blue, coffee brown, flour white, spinach green, ink black, sunflower yellow, rust
brown, ocean blue, lettuce green, soot black, butter yellow, sugar white, frog green, brick red,
walnut brown, ivory white, moss green, rice white, blueberry blue"""
SENTENCES = """the cat sleeps, we walk to school, she reads a long book, it rains, my brother
plays the piano, they like warm bread, the old man smiles, birds sing in the morning, he opens the
door, the train is late, children run in the park, I drink cold water, the moon is bright tonight,
nobody knows the way, a red car stops here, the soup is too hot, we watch the stars, her dog is
small, the river flows to the sea, time flies, the baker sells fresh rolls, our team won the game,
this box is very heavy, the wind blows from the west, bees make honey, the lamp is broken, you
write well, the shop opens at nine, snow covers the roof, he paints the wall white, the boat
leaves soon, they dance, my tea is ready, the teacher asks a question, an apple falls from the
tree, we sit by the fire, the clock strikes ten, a fox crosses the road, the garden is full of
flowers, she sings softly, the bus turns left, our house is old, the king lost his crown, wolves
howl at night, a bell rings, the path is steep, he found a coin, the bread is warm"""
NAMES = """Anna Ben Clara David Emma Felix Grace Henry Ida Jacob Karen Leo Maria Nina Oscar Paula
Robert Sara Thomas Vera Walter Alice Bruno Carla"""
CITIES = """London Paris Rome Berlin Madrid Vienna Boston Chicago Dublin Lisbon Oslo Prague Athens
Milan Geneva Munich Toronto Seattle"""
MONTHS = """January February March April May June July August September October November
December"""


class Task(NamedTuple):
  """`ask` and `ask_otherwise` hold `{}`, or stand before an input if `in_input`."""

  about: str
  facts: list[tuple[Any, str]]  # what is asked, the answer
  ask: tuple[str, ...]
  ask_otherwise: tuple[str, ...]  # of the held-out part
  in_input: bool = False


def pairs(text: str) -> list[tuple[str, str]]:
  split = (entry.split() for entry in text.replace("\n", " ").split(","))
  return [tuple(word.replace("_", " ") for word in words) for words in split]


def sentences() -> list[str]:
  return [" ".join(sentence.split()) for sentence in SENTENCES.split(",")]


def sums(rng: random.Random) -> list[tuple[str, str]]:
  drawn = rng.sample([(a, b) for a in range(2, 13) for b in range(2, 13)], TRAIN + HELDOUT)
  return [(f"{a} and {b}", str(a + b)) for a, b in drawn]


def dates(rng: random.Random) -> list[tuple[str, str]]:
  found = []
  for day, month, year in zip(
    (rng.randrange(1, 29) for _ in range(TRAIN + HELDOUT)),
    (rng.randrange(12) for _ in range(TRAIN + HELDOUT)),
    rng.sample(range(1900, 2030), TRAIN + HELDOUT),
    strict=True,
  ):
    found.append((f"{day} {MONTHS.split()[month]} {year}", f"{year}-{month + 1:02}-{day:02}"))
  return found


def people(rng: random.Random) -> list[tuple[str, str]]:
  every = [(name, city) for name in NAMES.split() for city in CITIES.split()]
  forms = ("{} lives in {}.", "{} moved to {} last year.", "{} has a flat in {}.",
           "{} works in {}.")  # fmt: skip
  return [
    (rng.choice(forms).format(name, city), city)
    for name, city in rng.sample(every, TRAIN + HELDOUT)
  ]


def tasks(rng: random.Random) -> list[Task]:
  spoken = sentences()
  return [
    Task("capital", pairs(CAPITALS),
         ("What is the capital of {}?", "Name the capital of {}.",
          "Which city is the capital of {}?"),
         ("Tell me the capital city of {}.", "{} has which capital?")),
    Task("opposite", pairs(OPPOSITES),
         ("What is the opposite of {}?", "Give the opposite of the word {}.",
          "Name the opposite of {}."),
         ("Which word means the contrary of {}?", "Tell me the antonym of {}.")),
    Task("plural", pairs(PLURALS),
         ("What is the plural of {}?", "Give the plural of the noun {}.",
          "Write {} in the plural."),
         ("One {}, two what?", "Tell me the plural form of {}.")),
    Task("kind", pairs(KINDS),
         ("Is {} an animal, a plant or a tool?", "Say whether {} is an animal, a plant or a tool.",
          "Animal, plant or tool: what is {}?"),
         ("Sort {} under animal, plant or tool.", "Choose animal, plant or tool for {}.")),
    Task("colour", pairs(COLOURS),
         ("What colour is {}?", "Name the usual colour of {}.", "Which colour does {} have?"),
         ("Tell me the colour of {}.", "{}: which colour is that?")),
    Task("sum", sums(rng),
         ("What is the sum of {}?", "Add {}.", "How much are {} together?"),
         ("Tell me the total of {}.", "Compute the sum: {}.")),
    Task("capitals", [(s, s.upper()) for s in spoken],
         ("Write the sentence in capital letters.", "Put all letters in upper case.",
          "Rewrite the text in capitals."),
         ("Change every letter to upper case.", "Make this all capital letters."), True),
    Task("words", [(s, str(len(s.split()))) for s in spoken],
         ("How many words does the sentence have?", "Count the words of the text.",
          "Give the number of words."),
         ("Tell me how many words there are.", "What is the word count?"), True),
    Task("date", dates(rng),
         ("Write the date as year-month-day.", "Give the date in numbers, the year first.",
          "Put the date into the form YYYY-MM-DD."),
         ("Convert this date to YYYY-MM-DD.",
          "Tell me the date as year, month and day in numbers."),
         True),
    Task("city", people(rng),
         ("Which city is named in the sentence?", "Find the city in the text.", "Name the city."),
         ("Extract the city.", "Tell me which city the text mentions."), True),
  ]  # fmt: skip


def answer(task: Task, said: str) -> str:
  return json.dumps({"answer": said, "about": task.about})


def examples() -> Iterator[tuple[bool, dict[str, str]]]:
  """(held out, example) of every task."""
  rng = random.Random(2026)
  for task in tasks(rng):
    facts = rng.sample(task.facts, TRAIN + HELDOUT)
    for i, (asked, said) in enumerate(facts):
      held_out = i >= TRAIN
      form = rng.choice(task.ask_otherwise if held_out else task.ask)
      made = {"instruction": form if task.in_input else form.format(asked)}
      made |= {"input": asked} if task.in_input else {}
      yield held_out, made | {"output": answer(task, said)}


def main() -> None:
  made = list(examples())
  random.Random(1).shuffle(made)
  for name, part in (("train", False), ("heldout", True)):
    lines = [json.dumps(example) for held_out, example in made if held_out == part]
    (HERE / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    print(f"{name}.jsonl: {len(lines)} examples")


if __name__ == "__main__":
  main()
