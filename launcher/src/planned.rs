//! A forecast in words: what `panglot plan` prints as comments, and what a run says of its memory and bytes.

use std::time::Duration;

use configs::planner::{At, Choice, Forecast, Memory, Traffic};
use configs::{Mix, Plan};

use crate::text;

/// "5.6 GiB: weights 1.2 GiB + gradients …".
pub fn memory(memory: &Memory) -> String {
    let kinds = memory.kinds().into_iter().filter(|(_, bytes)| *bytes > 0);
    let kinds: Vec<String> = kinds
        .map(|(name, bytes)| format!("{name} {}", text::bytes(bytes)))
        .collect();
    format!("{} = {}", text::bytes(memory.total()), kinds.join(" + "))
}

/// "12.3 GiB", or what it is at most.
pub fn traffic(traffic: &Traffic) -> String {
    let most = if traffic.rows_may_travel { "at most " } else { "" };
    format!("{most}{}", text::bytes(traffic.total()))
}

fn fullest(memory: &Memory, layers: usize) -> String {
    match memory.fullest {
        At::Forward(0) | At::Backward(0) => "in the embedding".to_owned(),
        At::Forward(stage) => format!("in the forward of layer {} of {layers}", stage),
        At::Backward(stage) if stage > layers => "in the head".to_owned(),
        At::Backward(stage) => format!("in the backward of layer {} of {layers}", stage),
        At::Publication => "after the update".to_owned(),
    }
}

/// What a run takes, line by line, with the table of what fits.
pub fn lines(plan: &Plan, layers: usize, forecast: &Forecast) -> Vec<String> {
    let Forecast {
        place, step, saving, ..
    } = forecast;
    let mut lines = Vec::new();
    let mut line = |name: &str, value: String| lines.push(format!("{name:<20}{value}"));
    line(
        "hardware",
        format!(
            "{}, {} of {}",
            forecast.hardware,
            text::counted(place.nodes, "node"),
            text::counted(place.ranks_per_node, "rank")
        ),
    );
    if let Some(why) = &forecast.impossible {
        line("impossible", why.clone());
    }
    let room = if forecast.memory.total() <= forecast.usable {
        "of"
    } else {
        "which does NOT fit the"
    };
    line(
        "memory of a rank",
        format!(
            "{}, {room} {} there are to plan with",
            memory(&forecast.memory),
            text::bytes(forecast.usable)
        ),
    );
    line(
        "",
        format!(
            "fullest {}; recomputed: {}",
            fullest(&forecast.memory, layers),
            forecast.recompute.sentence(layers)
        ),
    );
    if forecast.memory.host > 0 {
        let room = match forecast.usable_on_host {
            None => String::new(),
            Some(usable) if forecast.fits_host() => format!(", of {} there are to plan with", text::bytes(usable)),
            Some(usable) => format!(
                ", which does NOT fit the {} there are to plan with",
                text::bytes(usable)
            ),
        };
        line(
            "on its host",
            format!(
                "{}: what is written as checkpoints or offloaded{room}",
                text::bytes(forecast.memory.host)
            ),
        );
    }
    line(
        "sent in a step",
        format!("{} by each rank, on average", traffic(&forecast.traffic)),
    );
    let flop = &forecast.flop_per_token;
    let again = match flop.computed / flop.model - 1.0 {
        more if more > 0.005 => format!(", {:.1} with what is computed again", flop.computed / 1e9),
        _ => String::new(),
    };
    line("GFLOP a token", format!("{:.1}{again}", flop.model / 1e9));
    let waiting = match place.world() {
        1 => String::new(),
        _ => format!(
            ", {} waiting for collectives ({:.0} % of their {} hidden)",
            seconds(step.exposed),
            100.0 * step.hidden_share(),
            seconds(step.communication),
        ),
    };
    line(
        "a step",
        format!(
            "{}: {} computing, {} updating{waiting}",
            seconds(step.total),
            seconds(step.compute),
            seconds(step.update),
        ),
    );
    line(
        "speed",
        format!(
            "{} tokens/s, {:.0} % of the peak",
            text::count(forecast.tokens_per_second as u64),
            100.0 * forecast.share_of_peak
        ),
    );
    line(
        "the run",
        format!(
            "{} steps in {:.1} days, {} node-hours; without evaluation and failures",
            text::count(plan.train.steps),
            forecast.days,
            text::count(forecast.node_hours.ceil() as u64)
        ),
    );
    line(
        "a checkpoint",
        format!(
            "{}, {} to write; one every {} steps costs {} in all with a failure every {}",
            text::bytes(saving.bytes),
            seconds(saving.write_seconds),
            text::count(plan.checkpoint.every_steps),
            percent(saving.lost_share),
            text::duration(Duration::from_secs_f64(saving.mtbf_seconds)),
        ),
    );
    line(
        "",
        format!(
            "the best is one every {} steps ({}, Daly's interval): {}",
            text::count(saving.interval_steps),
            text::duration(Duration::from_secs_f64(saving.interval_seconds)),
            percent(saving.least_lost_share),
        ),
    );
    lines.push(String::new());
    lines.push(format!(
        "What fits {} a rank, by how training is divided:",
        text::bytes(forecast.usable)
    ));
    lines.extend(
        choices(layers, &forecast.choices)
            .lines()
            .map(|line| line.trim_end().to_owned()),
    );
    let whys = forecast
        .choices
        .iter()
        .filter_map(|choice| Some((choice, choice.why.as_ref()?)));
    lines.extend(whys.map(|(choice, why)| format!("  {}: {why}", division(choice))));
    lines
}

fn division(choice: &Choice) -> String {
    let frozen = if choice.shard_frozen { ", shard_frozen" } else { "" };
    format!("zero {}{frozen}", choice.zero)
}

fn choices(layers: usize, choices: &[Choice]) -> String {
    let header = ["divided", ">kept", ">none", ">selective", ">full", "fits", ">tokens/s"];
    let rows = choices.iter().map(|choice| {
        let marked = if choice.chosen { " *" } else { "" };
        let fits = choice
            .cheapest
            .map_or("nothing".to_owned(), |mix: Mix| mix.sentence(layers));
        vec![
            format!("{}{marked}", division(choice)),
            text::bytes(choice.kept),
            text::bytes(choice.none),
            text::bytes(choice.selective),
            text::bytes(choice.full),
            fits,
            choice
                .tokens_per_second
                .map_or(String::new(), |speed| text::count(speed as u64)),
        ]
    });
    text::table(&header, rows)
}

/// "0.012 s", "3.4 s", or longer.
fn seconds(seconds: f64) -> String {
    match seconds {
        ..5e-5 => "0 s".to_owned(),
        ..0.0995 => format!("{:.1} ms", 1e3 * seconds),
        ..10.0 => format!("{seconds:.2} s"),
        _ => text::duration(Duration::from_secs_f64(seconds)),
    }
}

fn percent(share: f64) -> String {
    format!("{:.2} % of the time", 100.0 * share)
}
