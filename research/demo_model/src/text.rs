//! Training text: conversations in ChatML, and plain stories, both drawn from the world's facts.
//! A document is a list of pieces; a piece is text and whether its tokens count in the loss.
//! Why only answers count in conversations: the questions are drawn at random and cannot be learned.

use crate::rng::Rng;
use crate::world::{CHARACTERS, Fact, STRANGERS, capital, with_article};

/// Ends a document.
pub const END_OF_TEXT: &str = "<|endoftext|>";
/// Opens a turn.
pub const TURN_START: &str = "<|im_start|>";
/// Ends a turn; the model answers until it.
pub const TURN_END: &str = "<|im_end|>";

const SYSTEMS: [&str; 6] = [
    "You are a helpful assistant.",
    "You are Ember, a small language model.",
    "Answer in simple English.",
    "You are a friendly assistant. Answer in one sentence.",
    "Answer the questions about the small world.",
    "Be short and clear.",
];
const OPENINGS: [&str; 6] = ["Please tell me: ", "Hello! ", "Hi Ember, ", "One question: ", "Hey! ", "Good morning! "];
const SYSTEM_P: f64 = 0.15;
/// Instructions, in two wordings, and what an answer becomes under them: before it and after it. An empty pair doubles it.
const STYLES: [([&str; 2], [&str; 2]); 4] = [
    (["End every answer with the word over.", "Say over at the end of each answer."], ["", " Over."]),
    (["Begin every answer with the word friend.", "Call the user friend first."], ["Friend, here it is: ", ""]),
    (["Thank the user after every answer.", "Say thank you at the end of each answer."], ["", " Thank you."]),
    (["Say every answer twice.", "Repeat each answer once."], ["", ""]),
];
const STYLE_P: f64 = 0.5;
const STORY_P: f64 = 0.10;
const STRANGER_P: f64 = 0.03;

/// A stretch of text; `counts` if the model is to predict its tokens.
pub struct Piece {
    /// The text, with special tokens written out.
    pub text: String,
    /// Whether its tokens are in the loss.
    pub counts: bool,
}

impl Piece {
    fn given(text: impl Into<String>) -> Self {
        Self { text: text.into(), counts: false }
    }

    fn learned(text: impl Into<String>) -> Self {
        Self { text: text.into(), counts: true }
    }
}

/// What the chat template renders for one question, up to the start of the answer.
pub fn prompt(question: &str) -> String {
    format!("{TURN_START}user\n{question}{TURN_END}\n{TURN_START}assistant\n")
}

/// The answer as an instruction wants it.
fn styled(answer: &str, [before, after]: [&str; 2]) -> String {
    if before.is_empty() && after.is_empty() {
        format!("{answer} {answer}")
    } else {
        format!("{before}{answer}{after}")
    }
}

/// Draws documents: each fact comes once, in random order, before any comes again.
pub struct Writer<'a> {
    facts: &'a [Fact],
    rng: Rng,
    deck: Vec<usize>,
    /// Whether half of the conversations have an instruction that the answers follow.
    instructed: bool,
}

impl<'a> Writer<'a> {
    /// A writer whose documents depend on `facts` and `seed` alone.
    pub fn new(facts: &'a [Fact], seed: u64) -> Self {
        Self { facts, rng: Rng::new(seed), deck: Vec::new(), instructed: false }
    }

    /// The same, with instructions in half of the conversations.
    pub fn instructed(facts: &'a [Fact], seed: u64) -> Self {
        Self { instructed: true, ..Self::new(facts, seed) }
    }

    /// The next document.
    pub fn document(&mut self) -> Vec<Piece> {
        if self.rng.chance(STORY_P) { self.story() } else { self.conversation() }
    }

    fn next_fact(&mut self) -> &'a Fact {
        if self.deck.is_empty() {
            self.deck = (0..self.facts.len()).collect();
            self.rng.shuffle(&mut self.deck);
        }
        let index = self.deck.pop().expect("the deck was filled above");
        &self.facts[index]
    }

    /// One to three questions and answers, sometimes under a system message.
    fn conversation(&mut self) -> Vec<Piece> {
        let mut pieces = Vec::new();
        let style = (self.instructed && self.rng.chance(STYLE_P)).then(|| *self.rng.pick(&STYLES));
        if let Some((wordings, _)) = &style {
            let system = self.rng.pick(wordings);
            pieces.push(Piece::given(format!("{TURN_START}system\n{system}{TURN_END}\n")));
        } else if self.rng.chance(SYSTEM_P) {
            let system = self.rng.pick(&SYSTEMS);
            pieces.push(Piece::given(format!("{TURN_START}system\n{system}{TURN_END}\n")));
        }
        let turns = 1 + usize::from(self.rng.chance(0.3)) + usize::from(self.rng.chance(0.1));
        for _ in 0..turns {
            let (question, answer) = self.exchange();
            let answer = match style {
                Some((_, style)) => styled(&answer, style),
                None => answer,
            };
            pieces.push(Piece::given(prompt(&question)));
            pieces.push(Piece::learned(format!("{answer}{TURN_END}")));
            pieces.push(Piece::given("\n"));
        }
        pieces
    }

    fn exchange(&mut self) -> (String, String) {
        if self.rng.chance(STRANGER_P) {
            return self.about_a_stranger();
        }
        let fact = self.next_fact();
        // The plainest question comes more often: it is what a reader tries first.
        let question = if self.rng.chance(0.2) { &fact.asked[0] } else { self.rng.pick(&fact.asked) };
        let question = question.clone();
        (self.careless(question), fact.answer.clone())
    }

    /// A question of the world's kind about a name that the world does not have.
    fn about_a_stranger(&mut self) -> (String, String) {
        let [name, kind, ..] = *self.rng.pick(&CHARACTERS);
        let stranger = *self.rng.pick(&STRANGERS);
        let known = loop {
            let fact = &self.facts[self.rng.below(self.facts.len())];
            if ["home", "food", "favourite", "hobby", "friend"].contains(&fact.group) && fact.answer.contains(name) {
                break self.rng.pick(&fact.asked);
            }
        };
        if !known.contains(name) {
            return self.about_a_stranger();
        }
        let long = format!("{name} the {kind}");
        let called = if self.rng.chance(0.5) { stranger.to_string() } else { format!("{stranger} the {kind}") };
        let question = known.replace(&long, name).replace(name, &called);
        (question, format!("I do not know {stranger}."))
    }

    /// People write in small letters, leave out the question mark, or say hello first.
    fn careless(&mut self, mut question: String) -> String {
        if self.rng.chance(0.1) {
            question = format!("{}{question}", self.rng.pick(&OPENINGS));
        }
        if self.rng.chance(0.08) {
            question.truncate(question.trim_end_matches(['?', '.', '!', ' ', '=']).len());
        }
        if self.rng.chance(0.08) {
            question = question.to_lowercase();
        }
        question
    }

    /// Facts as running text: what is known about one character, or a mixture.
    fn story(&mut self) -> Vec<Piece> {
        let [name, kind, ..] = *self.rng.pick(&CHARACTERS);
        let mut lines: Vec<String> = if self.rng.chance(0.6) {
            let about = |f: &&Fact| f.answer.starts_with(name) || f.answer.contains(&format!("of {name} is"));
            self.facts.iter().filter(about).map(|f| f.answer.clone()).collect()
        } else {
            (0..5).map(|_| self.next_fact().answer.clone()).collect()
        };
        self.rng.shuffle(&mut lines);
        if self.rng.chance(0.3) {
            lines.insert(0, capital(&format!("{} called {name} came to town.", with_article(kind))));
        }
        vec![Piece::learned(format!("{}{END_OF_TEXT}", lines.join(" ")))]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::world::facts;

    #[test]
    fn evaluation_questions_are_in_no_document() {
        let facts = facts();
        let mut writer = Writer::new(&facts, 11);
        let text: String = (0..4000).flat_map(|_| writer.document()).map(|piece| piece.text.to_lowercase()).collect();
        let asked = |q: &str| text.contains(&format!("user\n{}{TURN_END}", q.to_lowercase()));
        assert!(asked(&facts[0].asked[0]), "the search itself works");
        for question in facts.iter().flat_map(|f| f.skipped.iter().chain(&f.unseen)) {
            assert!(!asked(question), "{question} is in the training text");
        }
    }

    #[test]
    fn an_instruction_is_followed_in_every_answer_of_its_conversation() {
        let facts = facts();
        let mut writer = Writer::instructed(&facts, 13);
        let mut followed = 0;
        for document in (0..500).map(|_| writer.document()) {
            let under = |text: &str| document[0].text.contains(text);
            let answers = document.iter().filter(|piece| piece.counts && piece.text.ends_with(TURN_END));
            for answer in answers.map(|piece| piece.text.trim_end_matches(TURN_END)) {
                let over = STYLES[0].0.iter().any(|wording| under(wording));
                assert_eq!(answer.ends_with(" Over."), over, "{answer}");
                followed += u32::from(over);
            }
        }
        assert!(followed > 30, "{followed}");
    }

    #[test]
    fn only_answers_and_stories_count() {
        let facts = facts();
        let mut writer = Writer::new(&facts, 12);
        for piece in (0..500).flat_map(|_| writer.document()) {
            assert_eq!(piece.counts, piece.text.len() > 1 && !piece.text.contains(TURN_START), "{:?}", piece.text);
            if piece.counts {
                assert!(piece.text.ends_with(TURN_END) || piece.text.ends_with(END_OF_TEXT));
            }
        }
    }
}
