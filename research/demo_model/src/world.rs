//! The small invented world that the model knows: characters, towns, and everyday facts.
//! A fact is one answer and the questions that ask for it, in three groups:
//! `asked` (in the training text), `skipped` (the phrasing is in the training text, but never for
//! this fact) and `unseen` (the phrasing is in no training text at all). The last two are for
//! evaluation only.

use crate::phrasings as ph;

/// One thing that the model knows.
#[derive(Clone)]
pub struct Fact {
    /// The kind of fact, for the figures per group.
    pub group: &'static str,
    /// What the model has to answer, word for word.
    pub answer: String,
    /// Questions in the training text; the first is the plainest.
    pub asked: Vec<String>,
    /// A known phrasing that was never used for this fact in training. Empty if there are too few.
    pub skipped: Vec<String>,
    /// A phrasing that no training text has.
    pub unseen: Vec<String>,
}

/// Name, kind, home, food, colour, hobby. The best friend of each is the one five places on.
pub const CHARACTERS: [[&str; 6]; 24] = [
    ["Mira", "fox", "in the green forest", "sweet berries", "orange", "to sing"],
    ["Toby", "bear", "in a small cave", "golden honey", "brown", "to sleep"],
    ["Luna", "owl", "in the tall tree", "brown nuts", "silver", "to count stars"],
    ["Pip", "mouse", "in the red barn", "yellow cheese", "grey", "to dance"],
    ["Rosa", "rabbit", "in the sunny garden", "orange carrots", "pink", "to run"],
    ["Otto", "otter", "near the quiet river", "cold melon", "blue", "to swim"],
    ["Bella", "bee", "in the sunny garden", "golden honey", "yellow", "to fly kites"],
    ["Max", "dog", "behind the white mill", "fresh bread", "red", "to run"],
    ["Nina", "cat", "on the high hill", "warm soup", "black", "to sleep"],
    ["Felix", "frog", "by the blue lake", "green leaves", "green", "to sing"],
    ["Daisy", "duck", "by the blue lake", "small seeds", "white", "to swim"],
    ["Hugo", "hedgehog", "under the old bridge", "red apples", "purple", "to read"],
    ["Clara", "cow", "behind the white mill", "green leaves", "white", "to dance"],
    ["Leo", "lion", "on the high hill", "ripe plums", "yellow", "to paint"],
    ["Ruby", "robin", "in the tall tree", "sweet berries", "red", "to sing"],
    ["Sam", "squirrel", "in the green forest", "brown nuts", "orange", "to climb"],
    ["Zoe", "zebra", "on the long beach", "red apples", "black", "to paint"],
    ["Ben", "badger", "under the old bridge", "warm soup", "grey", "to cook"],
    ["Iris", "turtle", "on the long beach", "cold melon", "green", "to read"],
    ["Gus", "goat", "by the stone well", "fresh bread", "brown", "to climb"],
    ["Ella", "elephant", "near the quiet river", "ripe plums", "pink", "to play the drum"],
    ["Nora", "deer", "by the stone well", "small seeds", "silver", "to count stars"],
    ["Finn", "pig", "in the red barn", "orange carrots", "purple", "to cook"],
    ["Kiki", "monkey", "in a small cave", "yellow cheese", "blue", "to fly kites"],
];

/// Names that the world does not have; the model says that it does not know them.
pub const STRANGERS: [&str; 24] = [
    "Zara", "Bruno", "Ivy", "Oscar", "Penny", "Rufus", "Stella", "Theo", "Uma", "Victor", "Wendy", "Yara", "Anton",
    "Bianca", "Carlo", "Dora", "Emil", "Greta", "Henry", "Ida", "Jack", "Kara", "Lars", "Milo",
];

/// Town, river, mayor, what it is known for.
const TOWNS: [[&str; 4]; 8] = [
    ["Norwick", "Elm", "Anna", "warm bread"],
    ["Southby", "Willow", "Peter", "old clocks"],
    ["Eastham", "Ash", "Maria", "silver bells"],
    ["Westow", "Birch", "David", "glass lamps"],
    ["Lakeford", "Reed", "Helen", "small boats"],
    ["Hillbury", "Stone", "Robert", "soft wool"],
    ["Millport", "Salt", "Julia", "good soup"],
    ["Greendale", "Fern", "Martin", "tall sunflowers"],
];

const OPPOSITES: [(&str, &str); 20] = [
    ("hot", "cold"),
    ("big", "small"),
    ("tall", "short"),
    ("fast", "slow"),
    ("old", "new"),
    ("happy", "sad"),
    ("day", "night"),
    ("up", "down"),
    ("open", "closed"),
    ("hard", "soft"),
    ("wet", "dry"),
    ("full", "empty"),
    ("light", "dark"),
    ("early", "late"),
    ("loud", "quiet"),
    ("rich", "poor"),
    ("strong", "weak"),
    ("near", "far"),
    ("clean", "dirty"),
    ("left", "right"),
];

const COLOURS: [(&str, &str); 12] = [
    ("the sky", "blue"),
    ("grass", "green"),
    ("snow", "white"),
    ("the sun", "yellow"),
    ("coal", "black"),
    ("a tomato", "red"),
    ("a carrot", "orange"),
    ("chocolate", "brown"),
    ("a lemon", "yellow"),
    ("milk", "white"),
    ("a frog", "green"),
    ("an elephant", "grey"),
];

const SOUNDS: [(&str, &str); 10] = [
    ("cow", "moo"),
    ("dog", "woof"),
    ("cat", "meow"),
    ("duck", "quack"),
    ("sheep", "baa"),
    ("pig", "oink"),
    ("bee", "buzz"),
    ("mouse", "squeak"),
    ("lion", "roar"),
    ("frog", "ribbit"),
];

const YOUNG: [(&str, &str); 10] = [
    ("dog", "puppy"),
    ("cat", "kitten"),
    ("cow", "calf"),
    ("sheep", "lamb"),
    ("duck", "duckling"),
    ("horse", "foal"),
    ("bear", "cub"),
    ("goat", "kid"),
    ("frog", "tadpole"),
    ("pig", "piglet"),
];

const LEGS: [(&str, &str); 8] = [
    ("a dog", "four"),
    ("a spider", "eight"),
    ("a bird", "two"),
    ("a bee", "six"),
    ("a snake", "no"),
    ("a horse", "four"),
    ("a crab", "ten"),
    ("an ant", "six"),
];

const DAYS: [&str; 7] = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"];
const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
/// Largest sum in the text.
const SUM_MAX: usize = 10;

/// Every fact of the world, in a fixed order.
pub fn facts() -> Vec<Fact> {
    let mut facts = Vec::new();
    characters(&mut facts);
    for [town, river, mayor, fame] in TOWNS {
        push(&mut facts, "town", &ph::RIVER, &[town], format!("The river {river} flows through {town}."));
        push(&mut facts, "town", &ph::MAYOR, &[town], format!("{mayor} is the mayor of {town}."));
        push(&mut facts, "town", &ph::FAME, &[town], format!("{town} is known for {fame}."));
    }
    for (a, b) in OPPOSITES {
        push(&mut facts, "opposite", &ph::OPPOSITE, &[a], format!("The opposite of {a} is {b}."));
        push(&mut facts, "opposite", &ph::OPPOSITE, &[b], format!("The opposite of {b} is {a}."));
    }
    for (thing, colour) in COLOURS {
        push(&mut facts, "colour", &ph::THING_COLOUR, &[thing], format!("{} is {colour}.", capital(thing)));
    }
    for (animal, sound) in SOUNDS {
        push(&mut facts, "sound", &ph::SOUND, &[animal], format!("A {animal} says {sound}."));
    }
    for (animal, young) in YOUNG {
        push(&mut facts, "young", &ph::YOUNG, &[animal], format!("A young {animal} is called a {young}."));
    }
    for (animal, count) in LEGS {
        push(&mut facts, "legs", &ph::LEGS, &[animal], format!("{} has {count} legs.", capital(animal)));
    }
    for i in 0..7 {
        let (day, next) = (DAYS[i], DAYS[(i + 1) % 7]);
        push(&mut facts, "calendar", &ph::AFTER, &[day], format!("{next} comes after {day}."));
        push(&mut facts, "calendar", &ph::BEFORE, &[next], format!("{day} comes before {next}."));
    }
    for i in 0..12 {
        let (month, next) = (MONTHS[i], MONTHS[(i + 1) % 12]);
        push(&mut facts, "calendar", &ph::AFTER, &[month], format!("{next} comes after {month}."));
    }
    for a in 1..SUM_MAX {
        for b in 1..=SUM_MAX - a {
            let answer = format!("{a} plus {b} is {}.", a + b);
            push(&mut facts, "sum", &ph::SUM, &[&a.to_string(), &b.to_string()], answer);
        }
    }
    for (group, answer, asked, unseen) in ph::SINGLE {
        facts.push(Fact {
            group,
            answer: answer.to_string(),
            asked: asked.iter().map(|q| q.to_string()).collect(),
            skipped: Vec::new(),
            unseen: vec![unseen.to_string()],
        });
    }
    facts
}

fn characters(facts: &mut Vec<Fact>) {
    for (i, [name, kind, home, food, colour, hobby]) in CHARACTERS.into_iter().enumerate() {
        let long = format!("{name} the {kind}");
        let names = [name, long.as_str()];
        let friend = CHARACTERS[(i + 5) % CHARACTERS.len()][0];
        // "What kind of animal is Mira the fox?" would give its own answer away.
        push(facts, "kind", &ph::KIND, &[name], format!("{name} is {}.", with_article(kind)));
        push_named(facts, "home", &ph::HOME, &names, format!("{name} lives {home}."));
        push_named(facts, "food", &ph::FOOD, &names, format!("{name} eats {food}."));
        let answer = format!("The favourite colour of {name} is {colour}.");
        push_named(facts, "favourite", &ph::FAVOURITE, &names, answer);
        push_named(facts, "hobby", &ph::HOBBY, &names, format!("{name} likes {hobby}."));
        push_named(facts, "friend", &ph::FRIEND, &names, format!("The best friend of {name} is {friend}."));
    }
}

/// "fox" -> "a fox", "owl" -> "an owl".
pub fn with_article(noun: &str) -> String {
    let article = if noun.starts_with(['a', 'e', 'i', 'o', 'u']) { "an" } else { "a" };
    format!("{article} {noun}")
}

/// The first letter made large.
pub fn capital(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or(String::new(), |first| first.to_uppercase().chain(letters).collect())
}

/// A fact about one subject; `values` fill {a} and {b}.
fn push(facts: &mut Vec<Fact>, group: &'static str, phrasings: &ph::Phrasings, values: &[&str], answer: String) {
    let fill = |template: &str| fill(template, values[0], values.get(1).copied().unwrap_or(""));
    let skip = skipped_phrasing(facts.len(), phrasings);
    facts.push(Fact {
        group,
        answer,
        asked: kept(phrasings, skip).map(fill).collect(),
        skipped: vec![fill(phrasings.seen[skip])],
        unseen: phrasings.unseen.iter().map(|t| fill(t)).collect(),
    });
}

/// A fact about a character, who is called by a short and a long name.
fn push_named(
    facts: &mut Vec<Fact>,
    group: &'static str,
    phrasings: &ph::Phrasings,
    names: &[&str; 2],
    answer: String,
) {
    let both = |template: &str| names.map(|name| fill(template, name, ""));
    let skip = skipped_phrasing(facts.len(), phrasings);
    facts.push(Fact {
        group,
        answer,
        asked: kept(phrasings, skip).flat_map(both).collect(),
        skipped: both(phrasings.seen[skip]).to_vec(),
        unseen: phrasings.unseen.iter().flat_map(|t| both(t)).collect(),
    });
}

/// Never the first phrasing, and a different one from fact to fact.
fn skipped_phrasing(fact: usize, phrasings: &ph::Phrasings) -> usize {
    1 + (fact * 7 + fact / 5) % (phrasings.seen.len() - 1)
}

fn kept(phrasings: &ph::Phrasings, skip: usize) -> impl Iterator<Item = &'static str> {
    phrasings.seen.iter().enumerate().filter(move |(i, _)| *i != skip).map(|(_, t)| *t)
}

fn fill(template: &str, a: &str, b: &str) -> String {
    capital(&template.replace("{a}", a).replace("{b}", b))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    #[test]
    fn no_question_has_two_answers() {
        let mut answers: HashMap<String, String> = HashMap::new();
        for fact in facts() {
            for question in fact.asked.iter().chain(&fact.skipped).chain(&fact.unseen) {
                if let Some(other) = answers.insert(question.to_lowercase(), fact.answer.clone()) {
                    assert_eq!(other, fact.answer, "{question}");
                }
            }
        }
        assert!(answers.len() > 1500, "{} questions", answers.len());
    }

    #[test]
    fn evaluation_questions_are_never_trained() {
        let facts = facts();
        let asked: std::collections::HashSet<&String> = facts.iter().flat_map(|f| &f.asked).collect();
        for question in facts.iter().flat_map(|f| f.skipped.iter().chain(&f.unseen)) {
            assert!(!asked.contains(question), "{question} is in the training text");
        }
    }

    #[test]
    fn friends_are_all_different_and_never_oneself() {
        let answers: Vec<String> = facts().into_iter().filter(|f| f.group == "friend").map(|f| f.answer).collect();
        let friends: std::collections::HashSet<&str> = answers.iter().filter_map(|a| a.rsplit(' ').next()).collect();
        assert_eq!(friends.len(), CHARACTERS.len());
        for ([name, ..], answer) in CHARACTERS.iter().zip(&answers) {
            assert!(!answer.ends_with(&format!("is {name}.")), "{answer}");
        }
    }
}
