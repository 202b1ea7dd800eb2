"""What an answer is said to have drawn on: is the right source first, and is the right sentence quoted?

    python benchmarks/sources.py

Two lists of twelve short texts, each with a question that one of them answers. The answer is the model's own, right or
wrong. *Attention*: of how many questions the text that answers it has the largest share of the attention; *drawn*: the
largest share in `MemoryModel.drawn_on`; *quoted*: its passages hold the string that answers the question.

    coded      the default memory: coded updates, searched
    archived   the same with N = 128, K = 64, R = 256: most texts stand in the long-term part
    exact      hidden states, N = 2048, not searched
    flooded    the default memory, a text of 24 sentences among the twelve in the middle
"""

import argparse
import sys
from datetime import date
from typing import Any, NamedTuple

import torch

import latentmem
from latentmem import longterm
from latentmem.core.memory import Memory
from latentmem.model.model import MemoryModel

DEVELOPMENT = """
lease.txt: The lease of the flat in Harbour Street runs for three years. It was signed by Odile Marchetti on the
second of May. The rent is 940 euros a month, and the deposit is two months' rent.
? Who signed the lease?
= Odile Marchetti

garden.txt: The garden needs work before winter. Cut back the roses in October, and move the lemon tree into the shed.
The pond pump is to be cleaned every six weeks.
? Where does the lemon tree go?
= shed

bike.txt: My bicycle is a green Larkspur with seven gears. Its frame number is KX-48213. It was serviced by Tamsin
Okafor in March.
? What is the frame number of my bicycle?
= KX-48213

recipe.txt: Plum cake for eight people: 300 grams of flour, four eggs, a kilo of plums. Bake it at 180 degrees for
fifty minutes, and let it rest under a towel.
? How hot should the oven be for the plum cake?
= 180

meeting.txt: Notes of the meeting on Tuesday. Present were Farid, Hanneke and Solveig. We agreed to move the opening
of the library to the ninth of June, because the lift is not ready.
? When will the library open?
= ninth of June

dog.txt: Our dog is called Biscuit and is afraid of thunder. She gets her tablets with breakfast, half a tablet of
Relaxon. The vet is Doctor Pereira in Mill Lane.
? What is our dog afraid of?
= thunder

router.txt: The router stands in the cellar behind the washing machine. The name of the network is Quiet Otter, and
the password is sundial77.
? What is the password of the network?
= sundial77

trip.txt: The trip to the islands starts on Friday. The ferry leaves Stranvik at twenty past seven. We sleep at the
pension Lindblom, which is run by two sisters.
? Where do we sleep on the islands?
= Lindblom

car.txt: The car has to be inspected by the end of August. The garage Velmont asks 85 euros for it. The spare key
hangs in the pantry.
? Where is the spare key of the car?
= pantry

choir.txt: The choir meets on Thursdays at eight in the old school. This season we sing a requiem by Duarte Lopes. The
soprano Wilhelmina is looking for a lift.
? Who composed the requiem that the choir sings?
= Duarte Lopes

doctor.txt: The appointment with the dentist was moved to the fourth of November at a quarter to ten. Bring the old
X-rays, and eat nothing before it.
? When is the appointment with the dentist?
= fourth of November

work.txt: The server called Marrow is switched off on Sundays. Backups are made by Ingrid at midnight. If the alarm
goes, call the number 5550142.
? What number should be called if the alarm goes?
= 5550142
"""
TEST = """
boat.txt: The boat lies at the fourth jetty. Its engine is a Sorvald of nine horsepower, and it was repaired by
Matthias Quill. The winter cover is in the attic of the boat house.
? Who repaired the engine of the boat?
= Matthias Quill

school.txt: The school play is on the twelfth of December. Nora is the lighthouse keeper, and her costume has to be
ready by Monday. Tickets cost six euros.
? What part does Nora play?
= lighthouse keeper

bank.txt: The account for the club is at the Ostra Savings Bank. The treasurer is Pim Valdez. Fees of 45 euros are due
in January.
? Who is the treasurer of the club?
= Pim Valdez

heating.txt: The heating makes a noise when it starts. The fitter said that the valve in the bathroom is broken. A new
one costs 130 euros, and it comes from Dornach.
? What is broken in the heating?
= valve

birds.txt: We saw a kingfisher at the mill on Saturday. In the reeds there were two bitterns. Leopold counted forty
lapwings on the field behind the church.
? How many lapwings were counted?
= forty

phone.txt: The new telephone number of aunt Rosalind is 4471 902. She moved to Tarnwick in spring and lives above a
bakery now.
? What is the telephone number of aunt Rosalind?
= 4471 902

museum.txt: The museum opens at ten, and on Wednesdays it is free. The room with the globes is closed until Easter.
The guide is called Anneliese Brandt.
? Until when is the room with the globes closed?
= Easter

bread.txt: For the rye bread feed the starter in the evening. Use 700 grams of rye, and a spoon of caraway. My
grandmother Philippa left it to rise in a wooden bowl.
? Which spice goes into the rye bread?
= caraway

train.txt: The night train to Calderby leaves from platform six. Our compartment is number 31. Somebody called
Bertrand will wait for us at the station.
? Who will wait for us at the station?
= Bertrand

cat.txt: The cat of the neighbours is called Pumpernickel. While they are away, she gets one tin in the morning. The
key of the neighbours is under the stone frog.
? Where is the key of the neighbours?
= stone frog

paper.txt: The article on tides is to be handed in on the thirtieth of September. The editor is Constance Abara.
Figure three has to be drawn again in colour.
? Which figure has to be drawn again?
= three

chess.txt: The chess club plays in the back room of the Blue Heron. The last game was won by Yusuf with a sacrifice of
the queen. The next evening is on the nineteenth.
? Who won the last game of chess?
= Yusuf
"""
PLACES, BEDS = ("canal", "ridge", "coast", "river", "moor", "valley"), ("barn", "tent", "hut", "mill", "inn")
FLOOD = " ".join(
    f"On day {day} of the walk we went {7 + day % 9} miles along the {PLACES[day % 6]}, and slept in a {BEDS[day % 5]}."
    for day in range(1, 25)
)
KINDS: dict[str, dict[str, Any]] = {
    "coded": {},
    "archived": {"N": 128, "K": 64, "longterm": 256},
    "exact": {"N": 2048, "longterm": 0, "form": "exact"},
    "flooded": {},
}


class Text(NamedTuple):
    source: str
    text: str
    question: str
    value: str


def texts_of(block: str) -> list[Text]:
    """The texts of a block, each with its question."""
    texts = []
    for entry in block.strip().split("\n\n"):
        about, question, value = entry.replace("\n? ", "\0").replace("\n= ", "\0").replace("\n", " ").split("\0")
        texts.append(Text(*about.split(": ", 1), question, value))
    return texts


def written(llm: MemoryModel, kind: str, texts: list[Text]) -> Memory:
    memory = llm.empty(**KINDS[kind])
    for i, (source, text, _, _) in enumerate(texts):
        if kind == "flooded" and i == len(texts) // 2:
            memory = llm.write(memory, FLOOD, "walk.txt")
        memory = llm.write(memory, text, source)
    return memory


def by_attention(llm: MemoryModel, memory: Memory, question: str, answer: str) -> str:
    """The source with the largest share of attention."""
    prompts = llm.prompts_or_raise()
    asked = prompts.question(question, bare=True)
    mass, origins = llm.attended(memory, asked, prompts.answer(question, answer)), memory.origins
    if memory.R:
        places = torch.stack(llm.retrieve(memory, llm.ids(asked)).places)  # type: ignore[union-attr]
        origins = torch.cat([longterm.sources_of(memory, places), origins], dim=1)
    shares = mass / mass.sum(1, keepdim=True)
    sums = [shares[origins == i].sum().item() for i in range(len(memory.sources))]
    return memory.sources[sums.index(max(sums))].name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--show", action="store_true", help="print every answer with its passages")
    args = parser.parse_args()
    llm = latentmem.load()
    names = ("memory", "texts", "answers right", "attention", "drawn", "drawn, right answers", "quoted, right answers")
    print(f"{date.today()}\n\n| {' | '.join(names)} |\n|{' --- |' * len(names)}")
    for kind in args.kinds:
        for name, texts in (("development", texts_of(DEVELOPMENT)), ("test", texts_of(TEST))):
            counts = [0] * 5
            memory = written(llm, kind, texts)
            for source, _, question, value in texts:
                answer = llm.ask(memory, question, max_new_tokens=24)
                drawn = llm.drawn_on(memory, question, answer)
                right, first = value.lower() in answer.lower(), max(drawn.sources, key=drawn.sources.__getitem__)
                quoted = any(value.lower() in passage.text.lower() for passage in drawn.passages)
                hits = (right, by_attention(llm, memory, question, answer) == source, first == source)
                counts = [n + hit for n, hit in zip(counts, (*hits, right and hits[2], right and quoted), strict=True)]
                if args.show:
                    print(f"{question} {answer!r}: {drawn.passages}", file=sys.stderr)
            print(f"| {kind} | {name} | {' | '.join(map(str, counts))} |", flush=True)


if __name__ == "__main__":
    main()
