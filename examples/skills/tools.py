"""Tools: a request and a short list of tools. Each tool has 10 wordings of a request and 15 sets of arguments.

The arguments stand in the wordings as they stand in the call, letter for letter.
"""

from __future__ import annotations

from typing import NamedTuple


class Tool(NamedTuple):
    """A tool, the names of its arguments, how people ask for it, and what they ask for."""

    name: str
    arguments: list[str]
    wordings: list[str]
    values: list[list[str]]


def _tool(name: str, arguments: str, wordings: str, values: str) -> Tool:
    lines = [line.strip() for line in wordings.strip().splitlines()]
    return Tool(name, arguments.split(), lines, [value.split(" | ") for value in values.split(", ")])


#: What stands around the list of tools and the request. None says "tools:", after which a small model calls the first.
FRAMES = [
    "You can call {tools}.\nThe user says: {request}\nAnswer with one call.",
    "You may call {tools}.\nThe user asks: {request}\nAnswer with one call.",
    "One of {tools} can be called.\nThe user wants this: {request}\nAnswer with one call.",
]

TOOLS = [
    _tool(
        "weather",
        "city",
        """Is it raining in {city}?
        What will the sky be like over {city}?
        Should I take an umbrella to {city}?
        How warm is it in {city}?
        Tell me the forecast for {city}.
        I land in {city} tonight. Will it be cold?
        Is it windy in {city} right now?
        Will the sun shine on {city} this weekend?
        Do I need a coat in {city}?
        Check for storms near {city}.""",
        "Oslo, Lima, Cairo, Dublin, Nairobi, Boston, Madrid, Seoul, Naples, Quito, Prague, Denver, Lagos, Perth, "
        "Vienna",
    ),
    _tool(
        "timer",
        "minutes",
        """Wake me from my nap in {minutes} minutes.
        The eggs need {minutes} minutes.
        Count down {minutes} minutes for me.
        Beep when {minutes} minutes are over.
        I want to stretch for {minutes} minutes.
        The bread bakes for {minutes} minutes.
        Give me {minutes} minutes on the clock.
        Start a countdown of {minutes} minutes.
        The tea has to steep for {minutes} minutes.
        Tell me when {minutes} minutes have gone by.""",
        "3, 5, 7, 10, 12, 14, 16, 20, 25, 30, 8, 45, 6, 18, 40",
    ),
    _tool(
        "call",
        "person",
        """Ring {person} for me.
        I need to talk to {person} on the phone.
        Can you get {person} on the line?
        Dial {person}, please.
        Phone {person} and put it on speaker.
        Give {person} a call.
        I have to speak with {person} right away.
        Try to reach {person} by phone.
        Connect me with {person}.
        Please telephone {person}.""",
        "Tomas, Priya, Grandma, Elena, Marcus, Dr. Lee, Aisha, Henrik, Mum, Carlos, Yuki, Sofia, Ben, Ingrid, Omar",
    ),
    _tool(
        "music",
        "artist",
        """Put on some {artist}.
        I feel like hearing {artist}.
        Let's listen to {artist}.
        Play me a song by {artist}.
        Start some music by {artist}.
        Could you play {artist} in the kitchen?
        Fill the room with {artist}.
        I am in the mood for {artist}.
        Shuffle {artist}.
        Some {artist} would be nice now.""",
        "Mozart, Queen, Adele, Bach, Elvis, Abba, Chopin, Madonna, Prince, Vivaldi, Nirvana, Beethoven, Blondie, "
        "Verdi, Shakira",
    ),
    _tool(
        "add_to_list",
        "item",
        """We have run out of {item}.
        Put {item} on the shopping list.
        Remember that I have to buy {item}.
        There is no {item} left in the kitchen.
        We need {item} from the shop.
        The last of the {item} is gone, so note it for Saturday.
        Write down {item} for the market.
        I forgot to buy {item} again.
        Add {item} to what we have to buy.
        Next time we shop, we need {item}.""",
        "milk, rice, soap, butter, flour, coffee, honey, sugar, pepper, bread, cheese, salt, yeast, jam, tea",
    ),
    _tool(
        "lights",
        "room",
        """It is dark in the {room}.
        Turn the lamps on in the {room}.
        I cannot see a thing in the {room}.
        Light up the {room}, please.
        Make the {room} bright.
        Could we have some light in the {room}?
        Switch on the light in the {room}.
        The {room} needs light.
        Brighten the {room} for our guests.
        Lights on in the {room}.""",
        "kitchen, hall, garage, bedroom, cellar, office, bathroom, attic, porch, library, nursery, garden, study, "
        "pantry, workshop",
    ),
    _tool(
        "translate",
        "word language",
        """How do you say {word} in {language}?
        What is {word} in {language}?
        Put the word {word} into {language}.
        I need {word} in {language}.
        I need the word {word} in {language}.
        Translate {word} to {language}.
        Say {word} in {language} for me.
        Turn {word} into {language}.
        What would {word} be in {language}?
        Give me {word} in {language}.""",
        "river | French, house | German, friend | Italian, bread | Polish, window | Dutch, winter | Greek, market | "
        "Swedish, garden | Turkish, school | Danish, island | Finnish, forest | Hindi, bridge | Arabic, summer | "
        "Korean, mountain | Czech, flower | Latin",
    ),
    _tool(
        "directions",
        "place",
        """How do I get to the {place}?
        Show me the way to the {place}.
        Take me to the {place}.
        I am lost. Where is the {place}?
        What is the fastest road to the {place}?
        Guide me to the {place}.
        I want to walk to the {place}.
        Which way is the {place}?
        Find a route to the {place}.
        Lead me to the {place}, please.""",
        "museum, station, airport, castle, harbour, stadium, theatre, bakery, zoo, post office, cathedral, beach, "
        "market, bridge, hotel",
    ),
    _tool(
        "alarm",
        "time",
        """Wake me at {time}.
        I have to be up by {time}.
        Set my alarm for {time}.
        Get me out of bed at {time}.
        My shift begins early, so wake me at {time}.
        Ring the alarm at {time}.
        Please wake us at {time} tomorrow.
        I want to get up at {time}.
        Let the alarm go off at {time}.
        Do not let me sleep past {time}.""",
        "6:30, 7:15, 5:45, 8:00, 6:10, 9:20, 4:30, 7:50, 8:40, 5:05, 6:55, 7:35, 9:45, 5:20, 8:25",
    ),
    _tool(
        "message",
        "person text",
        """Tell {person} this: {text}.
        Text {person}: {text}.
        Send {person} the words {text}.
        Let {person} know: {text}.
        Write to {person}: {text}.
        Message {person} with {text}.
        Drop {person} a line that says {text}.
        Pass this on to {person}: {text}.
        Please write {person} a note: {text}.
        Send a message to {person} that says {text}.""",
        "Nora | I am late, Paul | dinner is ready, Kim | see you soon, Lucy | call me back, Felix | I found it, "
        "Maria | thank you, Jonas | the bus left, Clara | bring a coat, Victor | happy birthday, Anna | I am home, "
        "Leo | well done, Rosa | meet me outside, Ivan | the door is open, Emma | good luck, Hugo | lunch at noon",
    ),
    _tool(
        "define",
        "word",
        """What does {word} mean?
        I do not know the word {word}.
        Look up {word}.
        Explain the word {word}.
        Somebody wrote {word}. What is that?
        Find {word} in the dictionary.
        Give me the meaning of {word}.
        Define {word} for me.
        My teacher used the word {word}. Look it up.
        What is meant by {word}?""",
        "brittle, candid, frugal, humble, lucid, nimble, obscure, prudent, serene, tedious, vivid, wary, zealous, "
        "eager, subtle",
    ),
    _tool(
        "book_table",
        "restaurant people",
        """I want to eat at {restaurant} with {people} people in all.
        A table at {restaurant} for {people}, please.
        Reserve at {restaurant} for {people}.
        Book {restaurant} for {people} guests.
        Get us a table at {restaurant}. We are {people}.
        Can {restaurant} seat {people} of us?
        Dinner at {restaurant} for {people}.
        Hold a table at {restaurant} for {people} people.
        Ask {restaurant} for a table for {people}.
        Lunch at {restaurant}, {people} people.""",
        "Bella | 2, Saffron | 4, Olive | 3, Tokyo | 5, Paprika | 6, Harvest | 8, Lotus | 7, Riviera | 9, Juniper | "
        "10, Basil | 12, Sequoia | 2, Magnolia | 3, Panda | 4, Oasis | 6, Corner | 5",
    ),
    _tool(
        "news",
        "topic",
        """What is new in {topic}?
        Read me the headlines about {topic}.
        Has anything happened in {topic} today?
        Show me stories about {topic}.
        Catch me up on {topic}.
        Any news about {topic}?
        I want to read about {topic} this morning.
        Give me the latest on {topic}.
        What are the papers writing about {topic}?
        Bring me up to date on {topic}.""",
        "football, space, politics, tennis, fashion, farming, banking, chess, energy, travel, sailing, robots, "
        "cinema, cricket, housing",
    ),
    _tool(
        "thermostat",
        "degrees",
        """Make it {degrees} degrees in here.
        I am cold. Heat the house to {degrees} degrees.
        Set the heating to {degrees} degrees.
        Keep the flat at {degrees} degrees.
        Turn the heater to {degrees} degrees.
        Let the room reach {degrees} degrees.
        I like it at {degrees} degrees.
        Cool the house down to {degrees} degrees.
        Hold {degrees} degrees overnight.
        Bring the temperature to {degrees} degrees.""",
        "15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 14, 27, 13",
    ),
    _tool(
        "taxi",
        "place",
        """Order me a cab to the {place}.
        I need a ride to the {place}.
        Get a taxi to the {place}.
        Have a driver take me to the {place}.
        Send a car that goes to the {place}.
        Find me a lift to the {place}.
        I want to be driven to the {place}.
        Book a cab for a trip to the {place}.
        A taxi to the {place}, please.
        Call a cab. I am going to the {place}.""",
        "clinic, opera, college, ferry, gym, bank, park, court, church, library, factory, casino, arena, temple, "
        "embassy",
    ),
    _tool(
        "stock_price",
        "company",
        """What is a share of {company} worth?
        How is {company} doing on the stock market?
        Did {company} shares go up?
        Price of {company} stock, please.
        Look up shares of {company}.
        I own {company} shares. What are they worth?
        Check the stock of {company}.
        How much does {company} trade for?
        Quote me {company} on the exchange.
        Are {company} shares falling?""",
        "Apple, Toyota, Nestle, Intel, Shell, Sony, Disney, Ford, Siemens, Nokia, Boeing, Philips, Tesla, Honda, "
        "Pfizer",
    ),
    _tool(
        "recipe",
        "dish",
        """How do I cook {dish}?
        I want to make {dish} tonight.
        Find me instructions for {dish}.
        What goes into {dish}?
        Teach me to make {dish}.
        My guests want {dish}. How is it made?
        Show me a recipe for {dish}.
        I have never made {dish} before. Help me.
        Let's make {dish} together.
        Which steps does {dish} take?""",
        "lasagne, pancakes, curry, paella, omelette, pizza, chili, sushi, risotto, goulash, ramen, tacos, hummus, "
        "ratatouille, waffles",
    ),
    _tool(
        "remind",
        "task day",
        """Do not let me forget to {task} on {day}.
        Remind me to {task} on {day}.
        I have to {task} on {day}. Note it.
        Put this in my calendar: {task} on {day}.
        Nudge me to {task} on {day}.
        Make sure that I {task} on {day}.
        Keep in mind for me: {task}, on {day}.
        On {day} I must {task}. Remind me.
        Tell me on {day} to {task}.
        Schedule this for {day}: {task}.""",
        "water the plants | Monday, pay the rent | Friday, feed the cat | Sunday, wash the car | Saturday, see the "
        "dentist | Tuesday, mow the lawn | Thursday, visit Joan | Wednesday, clean the oven | Monday, post the "
        "letter | Friday, fix the bike | Sunday, empty the bins | Tuesday, renew the passport | Thursday, bake a "
        "cake | Saturday, iron the shirts | Wednesday, call the plumber | Monday",
    ),
    _tool(
        "find_book",
        "author",
        """I would like to read something by {author}.
        Which books by {author} do you have?
        Find novels by {author}.
        Search the library for {author}.
        Show me everything that {author} wrote.
        My book club reads {author} next. Find a copy.
        Look for works of {author}.
        Is there a book by {author} here?
        I am a fan of {author}. Find more.
        Get me a book from {author}.""",
        "Tolstoy, Austen, Orwell, Dickens, Kafka, Homer, Tolkien, Twain, Goethe, Verne, Woolf, Dante, Melville, "
        "Chekhov, Borges",
    ),
    _tool(
        "track_parcel",
        "number",
        """Where is my parcel {number}?
        Has package {number} arrived yet?
        Track number {number} for me.
        When will parcel {number} be here?
        I am still waiting for delivery {number}.
        Look up shipment {number}.
        Follow package {number}, please.
        What is the state of parcel {number}?
        My order has number {number}. Where is it now?
        Find delivery {number}.""",
        "4821, 7390, 1564, 2907, 8613, 5048, 3172, 9425, 6081, 2736, 7519, 1843, 4067, 9258, 3604",
    ),
]
