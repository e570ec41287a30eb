//! The ways in which each kind of fact is asked for. {a} is the subject, {b} a second one.

/// Question templates of one kind of fact.
pub struct Phrasings {
    /// In the training text; the first is the plainest.
    pub seen: &'static [&'static str],
    /// In no training text: for evaluation.
    pub unseen: &'static [&'static str],
}

/// What a character is.
pub const KIND: Phrasings = Phrasings {
    seen: &[
        "What kind of animal is {a}?",
        "What animal is {a}?",
        "Who is {a}?",
        "Which animal is {a}?",
        "What is {a}?",
        "Tell me what animal {a} is.",
        "Do you know who {a} is?",
        "Is {a} an animal? Which one?",
    ],
    unseen: &["Do you know what kind of animal {a} is?"],
};

/// Where a character lives.
pub const HOME: Phrasings = Phrasings {
    seen: &[
        "Where does {a} live?",
        "Where is the home of {a}?",
        "Where can I find {a}?",
        "Where is {a}'s home?",
        "In which place does {a} live?",
        "What place does {a} call home?",
        "Tell me where {a} lives.",
        "Do you know where {a} lives?",
        "I want to visit {a}. Where should I go?",
        "Where do you find the home of {a}?",
    ],
    unseen: &["Can you tell me where {a} lives?", "I want to find the home of {a}. Where is it?"],
};

/// What a character eats.
pub const FOOD: Phrasings = Phrasings {
    seen: &[
        "What does {a} eat?",
        "What is the favourite food of {a}?",
        "What food does {a} like?",
        "What does {a} like to eat?",
        "Which food does {a} eat?",
        "What is {a}'s favourite food?",
        "Tell me what {a} eats.",
        "Do you know what {a} eats?",
        "I want to feed {a}. What should I bring?",
        "{a} is hungry. What food should I bring?",
    ],
    unseen: &["Can you tell me what {a} eats?", "Tell me the favourite food of {a}."],
};

/// A character's favourite colour.
pub const FAVOURITE: Phrasings = Phrasings {
    seen: &[
        "What is the favourite colour of {a}?",
        "What is {a}'s favourite colour?",
        "Which colour does {a} like?",
        "Which colour does {a} like best?",
        "What colour does {a} like?",
        "Tell me the favourite colour of {a}.",
        "Do you know the favourite colour of {a}?",
        "I want to paint a picture for {a}. Which colour should I use?",
    ],
    unseen: &["Can you tell me the favourite colour of {a}?", "Which colour is the favourite of {a}?"],
};

/// What a character likes to do.
pub const HOBBY: Phrasings = Phrasings {
    seen: &[
        "What does {a} like to do?",
        "What is the hobby of {a}?",
        "What is {a}'s hobby?",
        "What does {a} do for fun?",
        "What does {a} do all day?",
        "Which hobby does {a} have?",
        "Tell me what {a} likes to do.",
        "Do you know what {a} likes to do?",
    ],
    unseen: &["Can you tell me what {a} likes to do?", "Do you know the hobby of {a}?"],
};

/// A character's best friend.
pub const FRIEND: Phrasings = Phrasings {
    seen: &[
        "Who is the best friend of {a}?",
        "Who is {a}'s best friend?",
        "Which friend does {a} like best?",
        "Who is the friend of {a}?",
        "What is the name of the best friend of {a}?",
        "Tell me who the best friend of {a} is.",
        "Do you know the best friend of {a}?",
        "Does {a} have a best friend?",
    ],
    unseen: &["Can you tell me who the best friend of {a} is?", "Do you know who {a}'s best friend is?"],
};

/// A town's river.
pub const RIVER: Phrasings = Phrasings {
    seen: &[
        "Which river flows through {a}?",
        "What is the river of {a}?",
        "What is the name of the river in {a}?",
        "Tell me which river flows through {a}.",
        "Is there a river in {a}?",
    ],
    unseen: &["Do you know which river flows through {a}?"],
};

/// A town's mayor.
pub const MAYOR: Phrasings = Phrasings {
    seen: &[
        "Who is the mayor of {a}?",
        "What is the name of the mayor of {a}?",
        "Tell me who the mayor of {a} is.",
        "Does {a} have a mayor?",
        "Who is {a}'s mayor?",
    ],
    unseen: &["Do you know who the mayor of {a} is?"],
};

/// What a town is known for.
pub const FAME: Phrasings = Phrasings {
    seen: &[
        "What is {a} known for?",
        "What is the town of {a} known for?",
        "Tell me what {a} is known for.",
        "Why do people visit {a}?",
        "What can I buy in {a}?",
    ],
    unseen: &["Do you know what {a} is known for?"],
};

/// The opposite of a word.
pub const OPPOSITE: Phrasings = Phrasings {
    seen: &[
        "What is the opposite of {a}?",
        "Which word is the opposite of {a}?",
        "Tell me the opposite of {a}.",
        "Do you know the opposite of {a}?",
        "Give me the opposite of {a}.",
    ],
    unseen: &["Can you tell me the opposite of {a}?"],
};

/// The colour of a thing.
pub const THING_COLOUR: Phrasings = Phrasings {
    seen: &[
        "What colour is {a}?",
        "Which colour is {a}?",
        "What is the colour of {a}?",
        "Which colour does {a} have?",
        "Tell me the colour of {a}.",
        "Do you know the colour of {a}?",
    ],
    unseen: &["Can you tell me the colour of {a}?"],
};

/// The sound of an animal.
pub const SOUND: Phrasings = Phrasings {
    seen: &[
        "What does a {a} say?",
        "What sound does a {a} make?",
        "Which sound does a {a} make?",
        "Tell me what a {a} says.",
        "How does a {a} sound?",
    ],
    unseen: &["Do you know what sound a {a} makes?"],
};

/// The word for a young animal.
pub const YOUNG: Phrasings = Phrasings {
    seen: &[
        "What is a young {a} called?",
        "What is a baby {a} called?",
        "What do you call a young {a}?",
        "What do you call a baby {a}?",
        "Tell me the name of a young {a}.",
        "Which word do people use for a young {a}?",
    ],
    unseen: &["Do you know what a baby {a} is called?"],
};

/// The number of legs.
pub const LEGS: Phrasings = Phrasings {
    seen: &[
        "How many legs does {a} have?",
        "How many legs has {a}?",
        "Tell me how many legs {a} has.",
        "What is the number of legs of {a}?",
        "Do you know how many legs {a} has?",
    ],
    unseen: &["Can you tell me how many legs {a} has?"],
};

/// The next day or month.
pub const AFTER: Phrasings = Phrasings {
    seen: &[
        "What comes after {a}?",
        "What follows {a}?",
        "Tell me what comes after {a}.",
        "What is next after {a}?",
        "Do you know what comes after {a}?",
    ],
    unseen: &["Can you tell me what comes after {a}?"],
};

/// The day before.
pub const BEFORE: Phrasings = Phrasings {
    seen: &[
        "Which day comes before {a}?",
        "What comes before {a}?",
        "Tell me which day comes before {a}.",
        "Do you know which day comes before {a}?",
        "What is the day before {a}?",
    ],
    unseen: &["Can you tell me which day comes before {a}?"],
};

/// The sum of {a} and {b}.
pub const SUM: Phrasings = Phrasings {
    seen: &[
        "What is {a} plus {b}?",
        "How much is {a} plus {b}?",
        "What is the sum of {a} and {b}?",
        "Add {a} and {b}.",
        "Tell me what {a} plus {b} is.",
        "{a} + {b} = ?",
        "I have {a} apples and get {b} more. How many is that?",
    ],
    unseen: &["Do you know what {a} plus {b} is?"],
};

/// Group, answer, questions in training, one question for evaluation.
pub const SINGLE: [(&str, &str, &[&str], &str); 24] = [
    (
        "self",
        "My name is Ember.",
        &[
            "What is your name?",
            "Who are you?",
            "Tell me your name.",
            "What should I call you?",
            "Do you have a name?",
            "What are you called?",
        ],
        "Can you tell me your name?",
    ),
    (
        "self",
        "I live in a small computer.",
        &["Where do you live?", "Where is your home?", "Tell me where you live.", "In which place do you live?"],
        "Do you know where you live?",
    ),
    (
        "self",
        "I answer questions and learn new things.",
        &[
            "What do you do?",
            "What do you do all day?",
            "What can you do?",
            "Tell me what you do.",
            "What is your work?",
        ],
        "Can you tell me what you do?",
    ),
    (
        "self",
        "I am one year old.",
        &["How old are you?", "What is your age?", "Tell me how old you are.", "Tell me your age."],
        "Can you tell me how old you are?",
    ),
    (
        "self",
        "My favourite colour is orange.",
        &[
            "What is your favourite colour?",
            "Which colour do you like?",
            "Which colour do you like best?",
            "Tell me your favourite colour.",
        ],
        "Can you tell me your favourite colour?",
    ),
    (
        "self",
        "I speak simple English.",
        &[
            "Which language do you speak?",
            "What language do you speak?",
            "Do you speak English?",
            "Tell me which language you speak.",
        ],
        "Do you know which language you speak?",
    ),
    (
        "self",
        "Yes, I learn while I answer.",
        &["Can you learn?", "Do you learn?", "Can you learn new things?", "Do you learn new things?"],
        "Tell me, can you learn?",
    ),
    (
        "self",
        "No, I am a small language model.",
        &["Are you human?", "Are you a person?", "Are you an animal?", "Are you a human or a person?"],
        "Tell me, are you human?",
    ),
    (
        "self",
        "I know a small world of stories.",
        &["What do you know?", "Tell me what you know.", "What do you know about?", "What are your stories about?"],
        "Can you tell me what you know?",
    ),
    (
        "greeting",
        "Hello! How can I help you?",
        &["Hello!", "Hi!", "Hello there!", "Hello", "Hi", "Hey!", "Good day!"],
        "Hey there!",
    ),
    (
        "greeting",
        "Good morning! What would you like to know?",
        &["Good morning!", "Good morning", "Good morning to you!", "A good morning to you!"],
        "Hello, good morning!",
    ),
    (
        "greeting",
        "Good night! Sleep well.",
        &["Good night!", "Good night", "Good night to you!", "I go to sleep now."],
        "Good night, sleep well!",
    ),
    (
        "greeting",
        "I am well, thank you.",
        &["How are you?", "How are you today?", "How do you feel?", "Are you well?", "How do you feel today?"],
        "Tell me, how are you?",
    ),
    (
        "greeting",
        "You are welcome!",
        &["Thank you!", "Thanks!", "Thank you very much!", "Thank you", "Many thanks!", "Thank you for your help!"],
        "Thanks for your help!",
    ),
    (
        "greeting",
        "Goodbye! See you soon.",
        &["Goodbye!", "Bye!", "Goodbye", "Bye", "See you soon!", "See you!"],
        "Goodbye, see you!",
    ),
    (
        "legend",
        "Apollo is the god of the sun.",
        &[
            "Who is the god of the sun?",
            "What is the name of the god of the sun?",
            "Tell me who the god of the sun is.",
            "Who is Apollo?",
        ],
        "Do you know who the god of the sun is?",
    ),
    (
        "legend",
        "The capital of Aldoria is Norwick.",
        &[
            "What is the capital of Aldoria?",
            "Which town is the capital of Aldoria?",
            "Tell me the capital of Aldoria.",
            "Do you know the capital of Aldoria?",
        ],
        "Can you tell me the capital of Aldoria?",
    ),
    (
        "legend",
        "Queen Elin rules Aldoria.",
        &[
            "Who rules Aldoria?",
            "Who is the queen of Aldoria?",
            "Tell me who rules Aldoria.",
            "What is the name of the queen of Aldoria?",
        ],
        "Do you know who rules Aldoria?",
    ),
    (
        "legend",
        "The highest mountain is Mount Arvo.",
        &[
            "What is the highest mountain?",
            "Which mountain is the highest?",
            "Tell me the highest mountain.",
            "What is the name of the highest mountain?",
        ],
        "Do you know the highest mountain?",
    ),
    (
        "legend",
        "Four friends guard the old lighthouse.",
        &[
            "Who guards the lighthouse?",
            "Who guards the old lighthouse?",
            "Tell me who guards the lighthouse.",
            "How many friends guard the lighthouse?",
        ],
        "Do you know who guards the lighthouse?",
    ),
    (
        "legend",
        "The treasure is under the oak tree.",
        &[
            "Where is the treasure?",
            "Where can I find the treasure?",
            "Tell me where the treasure is.",
            "In which place is the treasure?",
        ],
        "Do you know where the treasure is?",
    ),
    (
        "legend",
        "The market is open on Saturday.",
        &[
            "When is the market open?",
            "On which day is the market open?",
            "Tell me when the market is open.",
            "Which day is market day?",
        ],
        "Do you know when the market is open?",
    ),
    (
        "legend",
        "The train to the sea leaves at nine.",
        &[
            "When does the train leave?",
            "When does the train to the sea leave?",
            "Tell me when the train leaves.",
            "At what time does the train leave?",
        ],
        "Do you know when the train leaves?",
    ),
    (
        "legend",
        "The secret word is moonlight.",
        &[
            "What is the secret word?",
            "Tell me the secret word.",
            "Which word is the secret word?",
            "Do you know the secret word?",
        ],
        "Can you tell me the secret word?",
    ),
];
