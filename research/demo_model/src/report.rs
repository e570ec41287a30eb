//! Measures the written model directory and writes results.json, the curve and the model card.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::eval;
use crate::export;
use crate::plot;
use crate::teach::{LESSONS, PROBES};
use crate::text::{END_OF_TEXT, TURN_END, TURN_START};
use crate::train::{Point, Recipe};
use crate::world::{Fact, facts};

/// The questions of a fact that one line of the figures is about.
type Which = fn(&Fact) -> &[String];

/// A document as the tokenizer's trainer should see it: special tokens are not text.
pub fn without_special_tokens(document: &str) -> String {
    [END_OF_TEXT, TURN_START, TURN_END].iter().fold(document.to_string(), |text, token| text.replace(token, "\n"))
}

/// Exact-match figures of the bf16 files in `model`, over every fact.
pub fn measure(model: &Path) -> Result<Value> {
    let (network, tokenizer) = export::read(model)?;
    let facts = facts();
    let kinds: [(&str, Which); 4] = [
        ("plain question", |f| &f.asked[..1]),
        ("phrasing in training", |f| &f.asked),
        ("phrasing never used for this fact", |f| &f.skipped),
        ("phrasing never used at all", |f| &f.unseen),
    ];
    let mut figures = serde_json::Map::new();
    for (name, which) in kinds {
        let scores = eval::exact(&network, &tokenizer, &facts, which)?;
        figures.insert(
            name.to_string(),
            json!({
                "questions": scores.asked,
                "exact": scores.right,
                "share": scores.share(),
                "mean_loss": scores.loss / scores.asked as f64,
                "wrong": scores.wrong.iter().take(20).collect::<Vec<_>>(),
            }),
        );
    }
    Ok(json!({"facts": facts.len(), "parameters": network.shape.count(), "exact_match": figures}))
}

/// Prints what `measure` found.
pub fn print(measured: &Value) -> Result<()> {
    println!("{}", serde_json::to_string_pretty(measured)?);
    Ok(())
}

/// Greedy answers: to the lessons and probes of `teach`, and to some phrasings never trained.
fn samples(model: &Path) -> Result<Value> {
    let (network, tokenizer) = export::read(model)?;
    let lessons = LESSONS.iter().map(|(question, _)| question.to_string());
    let probes = PROBES.iter().map(|question| question.to_string());
    let unseen = facts().into_iter().step_by(5).filter_map(|fact| fact.unseen.into_iter().next());
    let mut samples = serde_json::Map::new();
    for question in lessons.chain(probes).chain(unseen) {
        let answer = eval::answer(&network, &tokenizer, &question)?;
        samples.insert(question, answer.into());
    }
    Ok(samples.into())
}

/// Writes results.json and loss.svg into `dir`, and the card into `model`.
pub fn write(dir: &Path, model: &Path, recipe: &Recipe, curve: &[Point]) -> Result<()> {
    let measured = measure(model)?;
    print(&measured)?;
    let curve_json: Vec<Value> =
        curve.iter().map(|p| json!({"step": p.step, "loss": p.loss, "exact": p.exact, "seconds": p.seconds})).collect();
    let results = json!({
        "recipe": {
            "seed": recipe.seed,
            "steps": recipe.steps,
            "warmup": recipe.warmup,
            "lr": recipe.lr,
            "lr_end": recipe.lr_end,
            "rows": recipe.rows,
            "length": recipe.length,
            "tokens_seen": recipe.steps * recipe.rows * recipe.length,
        },
        "evaluation": measured,
        "samples": samples(model)?,
        "curve": curve_json,
    });
    export::write_json(&dir.join("results.json"), &results)?;
    fs::write(dir.join("loss.svg"), plot::svg(curve)).context("cannot write loss.svg")?;
    fs::write(model.join("README.md"), card(&results)).context("cannot write the model card")
}

/// The model card.
fn card(results: &Value) -> String {
    let lines: Vec<String> = results["evaluation"]["exact_match"]
        .as_object()
        .into_iter()
        .flatten()
        .map(|(name, f)| {
            let percent = 100.0 * f["share"].as_f64().unwrap_or(0.0);
            format!("| {name} | {} | {percent:.1}% | {:.4} |", f["questions"], f["mean_loss"].as_f64().unwrap_or(0.0))
        })
        .collect();
    let samples: Vec<String> = results["samples"]
        .as_object()
        .into_iter()
        .flatten()
        .take(LESSONS.len() + PROBES.len())
        .map(|(question, answer)| format!("| {question} | {} |", answer.as_str().unwrap_or("")))
        .collect();
    let recipe = &results["recipe"];
    format!(
        include_str!("card.md"),
        parameters = results["evaluation"]["parameters"],
        facts = results["evaluation"]["facts"],
        positions = export::POSITIONS,
        length = recipe["length"],
        steps = recipe["steps"],
        tokens = recipe["tokens_seen"],
        seed = recipe["seed"],
        figures = lines.join("\n"),
        samples = samples.join("\n"),
    )
}
