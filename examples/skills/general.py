"""General: what SmolLM2-135M-Instruct can do before any training, by kind. Each line is a prompt and its answer.

The answer is a word or a form that a right reply has in it. No kind here is a kind in a training file.
"""

from __future__ import annotations


def _pairs(lines: str) -> list[tuple[str, str]]:
    pairs = [line.strip().rsplit(" | ", 1) for line in lines.strip().splitlines()]
    return [(prompt, answer) for prompt, answer in pairs]


KINDS = {
    "capitals": _pairs(
        """What is the capital of France? | Paris
        What is the capital of Japan? | Tokyo
        What is the capital of Germany? | Berlin
        What is the capital of Russia? | Moscow
        Which city is the capital of Egypt? | Cairo
        What is the capital of Greece? | Athens
        What is the capital of China? | Beijing
        What is the capital of Canada? | Ottawa
        What is the capital of Norway? | Oslo
        Which city is the capital of Ireland? | Dublin
        What is the capital of Austria? | Vienna
        What is the capital of Peru? | Lima
        What is the capital of Cuba? | Havana
        Which city is the capital of Poland? | Warsaw
        What is the capital of Kenya? | Nairobi
        What is the capital of Sweden? | Stockholm
        What is the capital of Hungary? | Budapest
        What is the capital of Thailand? | Bangkok
        What is the capital of India? | Delhi
        What is the capital of the United Kingdom? | London
        What is the capital of Iraq? | Baghdad
        What is the capital of Iran? | Tehran
        What is the capital of Chile? | Santiago
        What is the capital of Afghanistan? | Kabul"""
    ),
    "countries and languages": _pairs(
        """In which country is the Eiffel Tower? | France
        In which country is the Colosseum? | Italy
        In which country is the Great Wall? | China
        In which country is the Taj Mahal? | India
        In which country are the pyramids of Giza? | Egypt
        In which country is the city of Toronto? | Canada
        In which country is the city of Munich? | Germany
        In which country is the city of Sydney? | Australia
        On which continent is Brazil? | South America
        On which continent is Nigeria? | Africa
        What language do people speak in Japan? | Japanese
        What language do people speak in Austria? | German
        What is the currency of Japan? | yen
        What is the currency of the United States? | dollar
        What is the currency of Germany? | euro
        What is the currency of India? | rupee
        In which country is Berlin? | Germany
        In which country is Barcelona? | Spain
        In which country is the city of Chicago? | United States
        In which country is the Statue of Liberty? | United States
        What is the currency of the United Kingdom? | pound
        What language do people speak in Italy? | Italian
        What language do people speak in Russia? | Russian
        What language do people speak in Germany? | German"""
    ),
    "people and books": _pairs(
        """Who wrote Romeo and Juliet? | Shakespeare
        Who wrote Pride and Prejudice? | Austen
        Who wrote The Hobbit? | Tolkien
        Who wrote Harry Potter? | Rowling
        Who painted the Mona Lisa? | Leonardo
        Who wrote Hamlet? | Shakespeare
        Who was the first person to walk on the Moon? | Armstrong
        Who wrote The Odyssey? | Homer
        Who painted the ceiling of the Sistine Chapel? | Michelangelo
        Who invented the telephone? | Bell
        Who wrote Animal Farm? | Orwell"""
    ),
    "arithmetic": _pairs(
        """What is 2 + 2? | 4
        What is 10 + 10? | 20
        What is 7 + 2? | 9
        What is 6 + 6? | 12
        What is 2 times 3? | 6
        What is 3 times 3? | 9
        What is 10 divided by 2? | 5
        What is half of 10? | 5
        What is 1 + 1? | 2
        What is 12 - 2? | 10
        What is 3 + 3? | 6
        What is 100 + 100? | 200
        What is 2 times 2? | 4"""
    ),
    "calendar": _pairs(
        """How many hours are in a day? | 24
        How many seconds are in a minute? | 60
        Which month comes after January? | February
        What is the first month of the year? | January
        What is the last month of the year? | December
        How many days are in a year? | 365
        In which month is Christmas? | December
        How many days are in a week? | 7"""
    ),
    "opposites and words": _pairs(
        """What is the opposite of hot? | cold
        What is the opposite of big? | small
        What is the opposite of up? | down
        What is the opposite of happy? | sad
        What is the opposite of left? | right
        What is the opposite of day? | night
        What is the opposite of black? | white
        What is the opposite of fast? | slow
        What is the opposite of open? | closed
        What is the opposite of early? | late
        What is the opposite of young? | old
        What is the plural of cat? | cats
        What is the plural of child? | children
        What is the plural of mouse? | mice
        What is the French word for hello? | bonjour
        What is the Spanish word for hello? | hola
        What is the French word for thank you? | merci
        What is the opposite of strong? | weak
        What is the opposite of love? | hate
        What is the opposite of hard? | soft
        What is the opposite of light? | darkness
        What is the opposite of true? | false
        What is the opposite of war? | peace
        What is the plural of dog? | dogs
        What is the plural of foot? | feet
        What is the plural of box? | boxes"""
    ),
    "small talk": _pairs(
        """Hello! | help
        Good morning! | morning
        Good night! | night
        Nice to meet you. | meet
        Hi there! Can you help me? | help
        My dog died last week. | sorry
        I feel lonely tonight. | lonely
        Are you a human or an AI? | AI
        Do you have a name? | name
        Thanks a lot! | glad
        Thank you for your help. | glad
        Hi, how are you? | fine
        Good evening! | evening
        Good afternoon! | afternoon
        What is your name? | name"""
    ),
    "formats": _pairs(
        """Repeat this word: lantern | lantern
        Repeat this sentence: The sky is grey today. | The sky is grey today
        Say the word banana. | banana
        Write the word hello three times. | hello
        List three fruits as a numbered list. | 1.
        List four colours as a numbered list. | 1.
        List five cities as a numbered list. | 1.
        List three sports as a numbered list. | 1.
        Write a letter to my friend Anna that starts with Dear. | Dear
        Write a poem about the sea. | sea
        Write a short story that begins with Once upon a time. | Once upon a time
        Write a haiku about snow. | snow
        Write a short poem about autumn. | autumn
        Write a sentence with the word garden. | garden
        Write a sentence with the word bicycle. | bicycle
        Write a question that starts with Why. | Why
        Write Python code that prints hello. | print
        Write a Python function that adds two numbers. | def
        Make a title for a story about a lost dog. | dog
        Write an email to my boss that starts with Subject. | Subject
        List four countries as a numbered list. | 1.
        List two books as a numbered list. | 1.
        Write a sentence with the word piano. | piano
        Write a sentence with the word river. | river
        Repeat this word: umbrella | umbrella
        Repeat this sentence: I like green apples. | I like green apples
        Write a question that starts with How. | How
        Write a JavaScript line that prints hello. | console.log
        Write a letter to my aunt Rose that starts with Dear. | Dear Aunt"""
    ),
}
