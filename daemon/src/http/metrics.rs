//! `GET /metrics`: the status as Prometheus reads it (text format 0.0.4).

use std::fmt::{Display, Write};

use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};

use super::{App, blocking};
use crate::supervisor::Status;

/// All metrics.
pub async fn metrics(State(app): State<App>) -> Response {
    let text = blocking(move || text(&app.supervisor.status())).await;
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response()
}

/// The metrics of a status, each with its HELP and TYPE.
fn text(status: &Status) -> String {
    let mut out = Page(String::new());
    out.gauge("ready", "Whether a trainer is attached and can train.", u8::from(status.state.is_ready()));
    out.gauge("weight_version", "Updates that the live weights have had.", status.weight_version);
    out.gauge("step", "Number of the last step.", status.step);
    if let Some(generation) = status.generation {
        out.gauge("generation", "The generation that the files hold.", generation);
    }
    let examples: Vec<_> = status.queue.iter().map(|(state, count)| (state.as_str(), *count)).collect();
    out.family("examples", "gauge", "Examples in each state.", "state", &examples);
    let waiting = ["queued", "training"].iter().filter_map(|state| status.queue.get(*state)).sum::<u64>();
    out.gauge("queue_length", "Examples that wait to be trained or are in training.", waiting);
    if let Some(loss) = status.last_losses.back().and_then(|step| step.loss) {
        out.gauge("step_loss", "Mean loss of the last step over its decision tokens, in nats.", loss);
    }
    if let Some(t) = &status.timings {
        let phases = [
            ("prefill", t.prefill_ms),
            ("forward", t.forward_ms),
            ("backward", t.backward_ms),
            ("update", t.update_ms),
            ("hold", t.hold_ms),
            ("total", t.total_ms),
        ];
        let seconds = phases.map(|(phase, ms)| (phase, ms / 1e3));
        out.family("step_seconds", "gauge", "Time of the last step by phase.", "phase", &seconds);
    }
    let counts = &status.counts;
    let outcomes = [("applied", counts.applied), ("skipped", counts.skipped), ("failed", counts.failed)];
    out.family("steps_total", "counter", "Steps since the daemon's start.", "outcome", &outcomes);
    let help = "Updates between the applied steps' first look at the weights and their own, added up.";
    out.family("staleness_updates_total", "counter", help, "", &[("", counts.staleness_sum)]);
    out.gauge("staleness_updates_max", "The most of any step since the daemon's start.", counts.staleness_max);
    let outcomes = [("done", counts.syncs), ("failed", counts.syncs_failed)];
    out.family("syncs_total", "counter", "Syncs since the daemon's start.", "outcome", &outcomes);
    if let Some(guard) = &status.guard {
        // As Prometheus writes what is not finite.
        let nats = |value: Option<f64>| value.map_or_else(|| "+Inf".to_owned(), |value| value.to_string());
        let help = "Mean loss of the guard's probes at its last look, in nats a token.";
        out.gauge("probe_loss", help, nats(guard.probed.loss));
        let help = "How far that has risen since the guard first saw them.";
        out.gauge("probe_rise", help, nats(guard.probed.rise));
    }
    let help = "Times that the guard found harm.";
    out.family("harmed_total", "counter", help, "", &[("", counts.harmed)]);
    let outcomes = [("done", counts.dreams), ("failed", counts.dreams_failed)];
    out.family("dreams_total", "counter", "Dreams by the schedule since the daemon's start.", "outcome", &outcomes);
    let outcomes =
        [("accepted", counts.dreamt_accepted), ("rejected", counts.dreamt_rejected), ("known", counts.dreamt_known)];
    out.family("dreamt_answers_total", "counter", "What became of their answers.", "outcome", &outcomes);
    let outcomes = [("done", counts.invalidations), ("failed", counts.invalidations_failed)];
    let help = "Invalidations of the server's prefix cache since the daemon's start.";
    out.family("invalidations_total", "counter", help, "outcome", &outcomes);
    let outcomes = [("in_time", counts.holds - counts.holds_overrun), ("overran", counts.holds_overrun)];
    out.family("holds_total", "counter", "Holds of the engine since the daemon's start.", "outcome", &outcomes);
    out.family(
        "restarts_total",
        "counter",
        "Trainers that died since the daemon's start.",
        "",
        &[("", status.restarts)],
    );
    out.0
}

/// Text that grows by one metric at a time.
struct Page(String);

impl Page {
    fn gauge(&mut self, name: &str, help: &str, value: impl Display) {
        self.family(name, "gauge", help, "", &[("", value)]);
    }

    /// One sample per value of `label`; an empty label stands for none. The values of labels are words of ours.
    fn family(&mut self, name: &str, kind: &str, help: &str, label: &str, samples: &[(&str, impl Display)]) {
        let Self(out) = self;
        // Writing to a string does not fail.
        let _ = write!(out, "# HELP apollod_{name} {help}\n# TYPE apollod_{name} {kind}\n");
        for (of, value) in samples {
            let _ = match label {
                "" => writeln!(out, "apollod_{name} {value}"),
                _ => writeln!(out, "apollod_{name}{{{label}=\"{of}\"}} {value}"),
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::{Probed, WorstProbe};
    use crate::supervisor::{LastProbed, State, StepLoss, Timings};

    #[test]
    fn a_status_is_a_page_of_samples_each_with_help_and_type() {
        let mut status = Status { state: State::Idle, weight_version: 7, step: 9, ..Status::default() };
        status.queue = [("queued".to_owned(), 2), ("trained".to_owned(), 5), ("training".to_owned(), 1)].into();
        status.last_losses.push_back(StepLoss { step: 9, loss: Some(0.5), skipped: None });
        status.timings = Some(Timings { update_ms: 12.5, ..Timings::default() });
        (status.counts.holds, status.counts.holds_overrun, status.restarts) = (3, 1, 4);
        (status.counts.staleness_sum, status.counts.staleness_max) = (6, 2);
        let worst = Some(WorstProbe { line: 1, loss: None, reference: 1.0 });
        let probed =
            Probed { probes: 1, loss: None, reference: Some(1.0), rise: Some(0.25), limit: 0.1, worst, warning: None };
        status.guard = Some(LastProbed { at: "t".into(), probed, harmed: None });
        status.counts.harmed = 3;
        (status.counts.dreams, status.counts.dreamt_known) = (2, 8);
        let page = text(&status);
        for line in [
            "apollod_probe_loss +Inf",
            "apollod_probe_rise 0.25",
            "apollod_harmed_total 3",
            "apollod_dreams_total{outcome=\"done\"} 2",
            "apollod_dreamt_answers_total{outcome=\"known\"} 8",
            "apollod_ready 1",
            "apollod_weight_version 7",
            "apollod_examples{state=\"trained\"} 5",
            "apollod_queue_length 3",
            "apollod_step_loss 0.5",
            "apollod_step_seconds{phase=\"update\"} 0.0125",
            "apollod_holds_total{outcome=\"in_time\"} 2",
            "apollod_holds_total{outcome=\"overran\"} 1",
            "apollod_restarts_total 4",
            "apollod_staleness_updates_total 6",
            "apollod_staleness_updates_max 2",
        ] {
            assert!(page.lines().any(|l| l == line), "{line} is not in\n{page}");
        }
        for sample in page.lines().filter(|line| !line.starts_with('#')) {
            let name = sample.split(['{', ' ']).next().unwrap();
            assert!(page.contains(&format!("# HELP {name} ")) && page.contains(&format!("# TYPE {name} ")), "{name}");
            assert!(sample.rsplit(' ').next().unwrap().parse::<f64>().is_ok(), "{sample}");
        }
        let not_ready = text(&Status::default());
        assert!(not_ready.contains("apollod_ready 0\n") && !not_ready.contains("step_loss"), "{not_ready}");
    }
}
