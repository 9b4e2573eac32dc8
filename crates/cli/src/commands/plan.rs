//! `lighter plan`

use crate::arguments::PlanArguments;
use crate::container::Container;
use crate::failure::{Exit, Outcome};
use crate::language::LanguageFile;
use crate::model::{Means, Model, ModelSource, load_profile};
use crate::output::Output;
use crate::usage::Baseline;
use crate::values;
use anyhow::Context;
use lightering_meter::MemoryPool;
use std::fmt::Write as _;

/// Plans, prints the plan, and draws it.
pub fn run(arguments: &PlanArguments, output: Output) -> Outcome {
    let baseline = Baseline::now();
    let resources = &arguments.resources;
    let profile = load_profile(resources.machine.as_deref())?;
    let pool = MemoryPool::new(resources.memory);
    let threads = resources.threads.unwrap_or_else(lightering_meter::host::cores);
    let means = Means { threads, profile: &profile, pool: &pool, baseline: &baseline };
    let plan = if Container::of(&arguments.model) == Container::Gguf {
        LanguageFile::open(&arguments.model, &arguments.decoder, resources.memory, 1, 0)?.plan(means)?
    } else {
        let model = Model::open(&ModelSource::File(arguments.model.clone()))?;
        let dimensions = values::bind_dimensions(&resources.dimensions, &[], &model.inputs())?;
        model.plan_only(&dimensions, means)?
    };
    let mut text = plan.to_string();
    if let Some(path) = &arguments.svg {
        std::fs::write(path, plan.to_svg()).with_context(|| format!("writing {}", path.display()))?;
        // Writing to a String cannot fail.
        let _ = writeln!(text, "drawn in          {}", path.display());
    }
    output.result(&plan, &text)?;
    Ok(Exit::Done)
}
