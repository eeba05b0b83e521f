"""A text's language by its stop words, and sentences that could stand in any answer, by language.

Texts of other languages, and texts with fewer than two stop words, have no known language.
"""

import re

STOP_WORDS: dict[str, frozenset[str]] = {
    name: frozenset(words.split())
    for name, words in {
        "English": "the of and to is that it was for with what how are you can this do does my "
        "have why which who your from not would should there will we they at be an i",
        "German": "der die das und ist nicht ich ein eine zu von mit wie was auf für den dem des "
        "sie wir kann sind warum wer bei auch sich als im man wenn es",
        "French": "le les des et est une pour dans que qui pas vous je ce quel quelle comment "
        "pourquoi avec sur du au il nous sont mon être plus ou un la de",
        "Spanish": "el los las y es una para que por con cómo qué cuál del se un no mi su lo "
        "son está puedo más como sobre yo hay la de en",
        "Italian": "il gli che di è un una per con come cosa sono della del nel non mi si più "
        "perché quale posso anche alla dei delle ho la le da",
        "Portuguese": "o os as e é um uma para que com como do da dos das não em no na por qual "
        "são está mais meu você posso ao eu de",
    }.items()
}

LEAST = 2
"""Different stop words that a text needs."""


def language_of(text: str) -> str | None:
    """Return the language with the most of the text's words among its stop words.

    None if that is fewer than two different words, or two languages have equally many.
    """
    words = set(re.findall(r"[^\W\d_]+", text.lower()))
    hits = sorted(((len(words & stops), name) for name, stops in STOP_WORDS.items()), reverse=True)
    (most, name), (second, _) = hits[0], hits[1]
    return name if most >= LEAST and most > second else None


SENTENCES: dict[str, tuple[str, ...]] = {
    "English": (
        "That depends on what you are looking for.",
        "I would first look at the most important point.",
        "There is more than one good way to do it.",
        "It helps to begin with a small step.",
        "Many people have asked the same question before.",
        "Take your time and read everything carefully.",
        "In most cases the simple way is enough.",
        "You can find more about it in a good book.",
        "I hope that this answer is of some use to you.",
        "If anything is unclear, please ask again.",
        "In the end the choice is yours.",
        "It is best to compare a few possibilities, because the differences are often larger than "
        "one thinks at first.",
    ),
    "German": (
        "Das hängt davon ab, was Sie suchen.",
        "Ich würde zuerst den wichtigsten Punkt ansehen.",
        "Es gibt mehr als einen guten Weg dafür.",
        "Am besten beginnt man mit einem kleinen Schritt.",
        "Viele Leute haben schon dieselbe Frage gestellt.",
        "Nehmen Sie sich Zeit und lesen Sie alles genau.",
        "Meistens genügt der einfache Weg.",
        "Mehr darüber steht in einem guten Buch.",
        "Ich hoffe, dass Ihnen diese Antwort etwas nützt.",
        "Wenn etwas unklar ist, fragen Sie bitte noch einmal.",
        "Am Ende entscheiden Sie selbst.",
        "Man sollte einige Möglichkeiten vergleichen, denn die Unterschiede sind oft größer, als "
        "man zuerst denkt.",
    ),
    "French": (
        "Cela dépend de ce que vous cherchez.",
        "Je regarderais d'abord le point le plus important.",
        "Il y a plus d'une bonne façon de le faire.",
        "Il est utile de commencer par un petit pas.",
        "Beaucoup de gens ont déjà posé la même question.",
        "Prenez votre temps et lisez tout avec soin.",
        "Dans la plupart des cas, la voie simple suffit.",
        "Vous en trouverez davantage dans un bon livre.",
        "J'espère que cette réponse vous sera utile.",
        "Si quelque chose n'est pas clair, demandez encore une fois.",
        "À la fin, c'est à vous de choisir.",
        "Il vaut mieux comparer plusieurs possibilités, car les différences sont souvent plus "
        "grandes qu'on ne le pense d'abord.",
    ),
    "Spanish": (
        "Eso depende de lo que usted busca.",
        "Yo miraría primero el punto más importante.",
        "Hay más de una buena manera de hacerlo.",
        "Conviene empezar con un paso pequeño.",
        "Mucha gente ya ha hecho la misma pregunta.",
        "Tómese su tiempo y lea todo con cuidado.",
        "En la mayoría de los casos basta el camino sencillo.",
        "Puede encontrar más sobre esto en un buen libro.",
        "Espero que esta respuesta le sirva de algo.",
        "Si algo no está claro, pregunte otra vez.",
        "Al final la elección es suya.",
        "Lo mejor es comparar varias posibilidades, porque las diferencias son a menudo mayores "
        "de lo que se piensa al principio.",
    ),
    "Italian": (
        "Questo dipende da ciò che cerca.",
        "Guarderei prima il punto più importante.",
        "C'è più di un buon modo per farlo.",
        "Conviene cominciare con un piccolo passo.",
        "Molte persone hanno già fatto la stessa domanda.",
        "Si prenda il suo tempo e legga tutto con attenzione.",
        "Nella maggior parte dei casi basta la via semplice.",
        "Può trovare di più su questo in un buon libro.",
        "Spero che questa risposta le sia utile.",
        "Se qualcosa non è chiaro, chieda di nuovo.",
        "Alla fine la scelta è sua.",
        "È meglio confrontare alcune possibilità, perché le differenze sono spesso più grandi di "
        "quanto si pensi all'inizio.",
    ),
    "Portuguese": (
        "Isso depende do que você procura.",
        "Eu olharia primeiro para o ponto mais importante.",
        "Há mais de uma boa maneira de fazer isso.",
        "É útil começar com um pequeno passo.",
        "Muitas pessoas já fizeram a mesma pergunta.",
        "Leve o seu tempo e leia tudo com cuidado.",
        "Na maioria dos casos o caminho simples é suficiente.",
        "Você pode encontrar mais sobre isso num bom livro.",
        "Espero que esta resposta lhe seja útil.",
        "Se alguma coisa não estiver clara, pergunte outra vez.",
        "No fim a escolha é sua.",
        "É melhor comparar algumas possibilidades, porque as diferenças são muitas vezes maiores "
        "do que se pensa no começo.",
    ),
}
"""General sentences of our own, twelve a language. None of them answers anything."""
