//! The guard's probes on the live weights.

use std::sync::Arc;

use anyhow::{Context, Result};
use ipc::Attachment;
use model::{Cache, Example, Model};

use crate::backend::Backend;
use crate::config::Config;
use crate::examples;
use crate::guard::Guard;
use crate::protocol::Probed;

/// The probes of the configuration, if there are any, which this model can take; with their lines in the file.
///
/// # Errors
/// What is wrong with them, with the line.
pub fn read(config: &Config, model: &model::Config) -> Result<Option<Vec<(usize, Example)>>> {
    let Some(path) = &config.guard.probes else { return Ok(None) };
    let longest = super::longest(model, &config.train);
    let probes = examples::read(&config.model.dir, longest, path).context("guard.probes")?;
    for (line, probe) in &probes {
        let place = || format!("guard.probes: {}, line {line}", path.display());
        probe.check(longest, model.decoder.vocab).with_context(place)?;
    }
    Ok(Some(probes))
}

/// Measures and judges.
pub struct Watched<D: Backend> {
    device: Arc<D>,
    attachment: Arc<Attachment>,
    model: Arc<Model<D>>,
    cache: Cache<D>,
    probes: Vec<(usize, Example)>,
    guard: Guard,
}

impl<D: Backend> Watched<D> {
    /// Begins on live weights that equal the files, which are of `generation`; gives how the probes do there.
    ///
    /// # Errors
    /// The server is gone; what [`Guard::begin`] says.
    pub fn begin(
        config: &Config,
        probes: Vec<(usize, Example)>,
        generation: u64,
        model: &Arc<Model<D>>,
        attachment: &Arc<Attachment>,
    ) -> Result<(Watched<D>, Probed)> {
        let longest = probes.iter().map(|(_, probe)| probe.ids().len()).max().unwrap_or(1);
        let (device, mut cache) = (model.device().clone(), model.cache(longest));
        let losses = losses(&device, attachment, model, &mut cache, &probes)?;
        let guard = Guard::begin(&config.state_dir(), &probes, config.guard.max_rise, generation, &losses)?;
        let (probed, _) = guard.judge(&losses);
        Ok((Watched { device, attachment: attachment.clone(), model: model.clone(), cache, probes, guard }, probed))
    }

    /// The losses of the probes now, how they compare, and what is wrong with the weights if they are harmed.
    ///
    /// # Errors
    /// The server is gone.
    pub fn look(&mut self) -> Result<(Vec<f64>, Probed, Option<String>)> {
        let Watched { device, attachment, model, cache, probes, guard } = self;
        let losses = losses(device, attachment, model, cache, probes)?;
        let (probed, harm) = guard.judge(&losses);
        Ok((losses, probed, harm))
    }

    /// Takes these, which were not judged as harm, as the losses of a new generation.
    ///
    /// # Errors
    /// It cannot be written down.
    pub fn accept(&mut self, generation: u64, losses: &[f64]) -> Result<()> {
        self.guard.accept(generation, losses)
    }

    /// Looks at weights that somebody has chosen, however they do; training goes on from them.
    ///
    /// # Errors
    /// The server is gone; it cannot be written down.
    pub fn begin_again(&mut self, generation: u64) -> Result<Probed> {
        let (losses, ..) = self.look()?;
        self.guard.begin_from(generation, &losses)?;
        Ok(self.guard.judge(&losses).0)
    }
}

fn losses<D: Backend>(
    device: &Arc<D>,
    attachment: &Attachment,
    model: &Model<D>,
    cache: &mut Cache<D>,
    probes: &[(usize, Example)],
) -> Result<Vec<f64>> {
    let loss = |(_, probe): &(usize, Example)| {
        attachment.check()?;
        // Keys and values of what other weights made of the same beginning must not be recalled.
        cache.forget();
        let report = device.run(|| model.loss(cache, probe));
        Ok(report.loss_sum / report.tokens as f64)
    };
    probes.iter().map(loss).collect()
}
