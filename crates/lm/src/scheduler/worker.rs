//! The thread that owns the model: admits requests, packs steps, hands out what they give.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::SchedulerOptions;
use super::counters::{Counters, Telemetry};
use super::inbox::Inbox;
use super::pages::{NO_PAGE, Pools};
use super::request::FinishReason;
use super::sequence::{Sequence, Task, TokenTime};
use super::spill::Spill;
use crate::{Result, Row, StepReport, TokenModel, Tokenizer};

/// How often the model is asked what it can tell of itself.
const STATUS_INTERVAL: Duration = Duration::from_millis(200);

/// Says that the thread has ended, also when the model panicked.
struct End(Arc<Inbox>);

impl Drop for End {
    fn drop(&mut self) {
        self.0.end();
    }
}

pub(super) fn run(
    model: Box<dyn TokenModel>,
    tokenizer: &Tokenizer,
    options: SchedulerOptions,
    inbox: Arc<Inbox>,
    telemetry: Arc<Telemetry>,
    spill: Option<Spill>,
) {
    let _end = End(Arc::clone(&inbox));
    let mut options = options;
    let mut pools = Pools::new(model.page_len(), model.page_count(), model.window());
    if let Some(spill) = spill {
        // What is written is what is known to be in pages.
        options.prefix_reuse = true;
        pools.set_spill(spill);
    }
    let mut worker = Worker {
        model,
        tokenizer,
        options,
        inbox,
        telemetry,
        pools,
        running: Vec::new(),
        parked: Vec::new(),
        next_order: 1,
        step: 0,
        batch_rows: 0,
        status_at: None,
        gathered: Counters::default(),
    };
    worker.serve();
}

struct Worker<'t> {
    model: Box<dyn TokenModel>,
    tokenizer: &'t Tokenizer,
    options: SchedulerOptions,
    inbox: Arc<Inbox>,
    telemetry: Arc<Telemetry>,
    pools: Pools,
    /// Sequences that may hold pages, by age.
    running: Vec<Sequence<'t>>,
    /// Sequences that wait for pages, by age.
    parked: Vec<Sequence<'t>>,
    next_order: u64,
    step: u64,
    batch_rows: usize,
    status_at: Option<Instant>,
    /// What is not in the telemetry yet.
    gathered: Counters,
}

/// What a sequence gets of a step.
#[derive(Debug, Default)]
struct Share {
    rows: usize,
    drafts: Vec<u32>,
    /// The logits of the last row, and of drafts, are wanted.
    wanted: bool,
    /// Those of all rows are.
    all_wanted: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Purpose {
    Generate,
    Embed,
}

impl<'t> Worker<'t> {
    fn serve(&mut self) {
        loop {
            if self.inbox.is_abandoned() {
                break;
            }
            self.sweep();
            self.admit();
            if self.running.is_empty() && self.parked.is_empty() {
                if self.inbox.is_exhausted() {
                    break;
                }
                // Nothing changes until the next request, so that this stays true.
                self.status_at = None;
                self.publish();
                if self.inbox.len() == 0 {
                    self.inbox.wait();
                }
                continue;
            }
            let generated = self.advance(Purpose::Generate);
            let embedded = self.advance(Purpose::Embed);
            self.retire();
            self.publish();
            if !generated && !embedded {
                // Everybody's receiver is behind.
                self.inbox.wait();
            }
        }
        for sequence in std::mem::take(&mut self.running).into_iter().chain(std::mem::take(&mut self.parked))
        {
            self.end(sequence, FinishReason::Cancelled);
        }
        let mut unwanted = Vec::new();
        while let Some(waiting) = self.inbox.take(&mut unwanted) {
            self.gathered.requests_cancelled += 1;
            waiting.into_task(self.tokenizer).end(FinishReason::Cancelled);
        }
        self.publish();
    }

    /// Ends what nobody wants any more.
    fn sweep(&mut self) {
        for list in [&mut self.running, &mut self.parked] {
            for sequence in list.iter_mut().filter(|s| s.task.finish.is_none() && s.task.is_cancelled()) {
                sequence.task.finish = Some(FinishReason::Cancelled);
            }
        }
        self.retire();
    }

    /// Ends what has finished.
    fn retire(&mut self) {
        let finished: Vec<Sequence<'t>> = self
            .running
            .extract_if(.., |s| s.task.finish.is_some())
            .chain(self.parked.extract_if(.., |s| s.task.finish.is_some()))
            .collect();
        for mut sequence in finished {
            let reason = sequence.task.finish.take().expect("only finished ones are here");
            self.end(sequence, reason);
        }
    }

    fn end(&mut self, mut sequence: Sequence<'t>, reason: FinishReason) {
        sequence.release(&mut self.pools);
        let counter = match reason {
            FinishReason::Stop => &mut self.gathered.requests_stopped,
            FinishReason::Length => &mut self.gathered.requests_length,
            FinishReason::Cancelled => &mut self.gathered.requests_cancelled,
            FinishReason::Error(_) => &mut self.gathered.requests_failed,
        };
        *counter += 1;
        sequence.task.end(reason);
    }

    fn park(&mut self, index: usize) {
        let mut sequence = self.running.remove(index);
        self.take_pages(&mut sequence);
        self.put_aside(sequence);
    }

    fn take_pages(&mut self, sequence: &mut Sequence<'t>) {
        sequence.release(&mut self.pools);
        sequence.task.count_preemption();
        self.gathered.preemptions += 1;
    }

    fn put_aside(&mut self, mut sequence: Sequence<'t>) {
        sequence.evicted = false;
        let at = self.parked.partition_point(|other| other.order < sequence.order);
        self.parked.insert(at, sequence);
    }

    /// The youngest running sequence whose receiver is behind.
    fn stalled(&self) -> Option<usize> {
        (0..self.running.len()).rev().find(|index| self.running[*index].task.room() == 0)
    }

    /// Lets sequences run while there are places and pages: first those whose pages were taken, then new ones.
    fn admit(&mut self) {
        let mut unwanted = Vec::new();
        self.pools.flush(&*self.model);
        loop {
            let candidate = match self.parked.iter().position(|s| s.task.room() > 0) {
                Some(index) => index,
                // Receivers that are behind may only keep so many requests alive.
                None if self.parked.len() < self.options.queue_max => {
                    let Some(waiting) = self.inbox.take(&mut unwanted) else { break };
                    let order = self.next_order;
                    self.next_order += 1;
                    self.parked.push(Sequence::new(waiting.into_task(self.tokenizer), order));
                    self.parked.len() - 1
                }
                None => break,
            };
            let order = self.parked[candidate].order;
            // Whoever does not read makes room for whoever does.
            if self.running.len() >= self.options.sequences_max {
                match self.stalled() {
                    Some(index) => self.park(index),
                    None => break,
                }
            }
            let found = loop {
                let candidate = self.parked_at(order);
                let found = candidate.find_prefix(&self.pools);
                let tokens = candidate.task.tokens.len();
                if self.running.is_empty() || self.pools.admits(tokens, &found, self.running.len()) {
                    break Some(found);
                }
                match self.stalled() {
                    Some(index) => self.park(index),
                    None => break None,
                }
            };
            let Some(found) = found else { break };
            let index = self.parked.iter().position(|s| s.order == order).expect("the candidate is parked");
            let mut sequence = self.parked.remove(index);
            sequence.take_prefix(found, &mut self.pools, &mut *self.model);
            if sequence.task.start(sequence.computed) && !sequence.task.is_embedding() {
                self.gathered.prefix_lookup_tokens += sequence.task.tokens.len() as u64;
                self.gathered.prefix_hit_tokens += sequence.computed as u64;
            }
            let at = self.running.partition_point(|other| other.order < sequence.order);
            self.running.insert(at, sequence);
        }
        for waiting in unwanted {
            self.gathered.requests_cancelled += 1;
            waiting.into_task(self.tokenizer).end(FinishReason::Cancelled);
        }
    }

    fn parked_at(&self, order: u64) -> &Sequence<'t> {
        self.parked.iter().find(|s| s.order == order).expect("the candidate is parked")
    }

    /// Makes one step for the sequences of one purpose. Says whether there was anything to do.
    fn advance(&mut self, purpose: Purpose) -> bool {
        let mut shares = match purpose {
            Purpose::Generate => self.pack_generation(),
            Purpose::Embed => self.pack_embedding(),
        };
        for index in (0..self.running.len()).rev() {
            if self.running[index].evicted {
                let sequence = self.running.remove(index);
                shares.remove(index);
                self.put_aside(sequence);
            }
        }
        if shares.iter().all(|share| share.rows == 0) {
            return false;
        }
        self.step += 1;
        let before: Vec<usize> = self.running.iter().map(|s| s.task.tokens.len()).collect();
        let result = self.compute(purpose, &shares);
        match result {
            Ok(report) => self.settle(purpose, &shares, &before, report),
            Err(error) => self.fail(&shares, &error.to_string()),
        }
        true
    }

    /// Shares of a step that continues answers.
    fn pack_generation(&mut self) -> Vec<Share> {
        let mut shares: Vec<Share> = self.running.iter().map(|_| Share::default()).collect();
        let (rows_max, wanted_max) = (self.model.rows_max(), self.model.wanted_rows_max());
        let ready = |s: &Sequence<'_>| !s.task.is_embedding() && s.task.finish.is_none() && s.task.room() > 0;
        let (mut decode, mut prefill) = (Vec::new(), Vec::new());
        for (index, sequence) in self.running.iter().enumerate().filter(|(_, s)| ready(s)) {
            if sequence.pending() == 1 { decode.push(index) } else { prefill.push(index) }
        }
        // Whoever waits longest comes first, should there be more than a step can take.
        decode.sort_by_key(|index| (self.running[*index].last_step, self.running[*index].order));
        let reserve = match self.options.prefill_rows_max {
            _ if prefill.is_empty() => 0,
            0 => (rows_max / 4).max(1),
            limit => limit.min(rows_max),
        };
        // Prompts need at least one row of a step, or nothing new would ever start.
        let decode_rows_max =
            if prefill.is_empty() { rows_max } else { rows_max - reserve.min(rows_max / 4).max(1) };
        let decode_wanted_max = if prefill.is_empty() { wanted_max } else { wanted_max - 1 };
        let (mut rows, mut wanted) = (0, 0);
        let mut decode = decode.into_iter();
        while rows < decode_rows_max && wanted < decode_wanted_max {
            let Some(index) = decode.next() else { break };
            let given = usize::from(self.share_decode(index, &mut shares));
            (rows, wanted) = (rows + given, wanted + given);
        }
        let continued = rows > 0;
        let mut prompt_rows = if continued { reserve.min(rows_max - rows) } else { rows_max };
        for index in prefill {
            if prompt_rows == 0 {
                break;
            }
            let pending = self.running[index].pending();
            let mut count = pending.min(prompt_rows);
            let all_wanted = self.running[index].task.wants_prompt();
            if all_wanted {
                count = count.min(wanted_max - wanted);
            }
            if count == pending && wanted >= wanted_max {
                count -= 1;
            }
            if self.running[index].evicted || count == 0 {
                continue;
            }
            let count = self.reserve(index, count, &mut shares);
            if count > 0 {
                let last = count == pending;
                shares[index] = Share { rows: count, drafts: Vec::new(), wanted: last, all_wanted };
                wanted += if all_wanted { count } else { usize::from(last) };
                (rows, prompt_rows) = (rows + count, prompt_rows - count);
            }
        }
        // What prompts could not use, for want of pages, goes to sequences that had to stand back.
        while rows < rows_max && wanted < wanted_max {
            let Some(index) = decode.next() else { break };
            let given = usize::from(self.share_decode(index, &mut shares));
            (rows, wanted) = (rows + given, wanted + given);
        }
        self.add_drafts(&mut shares, rows_max - rows, wanted_max - wanted);
        shares
    }

    /// Gives a running sequence the row of its next token, if there is a page for it.
    fn share_decode(&mut self, index: usize, shares: &mut [Share]) -> bool {
        if self.running[index].evicted || self.reserve(index, 1, shares) == 0 {
            return false;
        }
        shares[index] = Share { rows: 1, wanted: true, ..Share::default() };
        true
    }

    /// Gives rows that are left to drafts, without taking pages from anybody.
    fn add_drafts(&mut self, shares: &mut [Share], mut rows: usize, mut wanted: usize) {
        if self.options.draft_len_max == 0 {
            return;
        }
        for (sequence, share) in self.running.iter_mut().zip(shares) {
            if share.rows != 1 || !share.wanted || sequence.evicted || sequence.pending() != 1 {
                continue;
            }
            let mut count = rows.min(wanted).min(sequence.task.room().saturating_sub(1));
            let positions = sequence.computed + 1;
            let drafts = sequence.task.draft(count);
            sequence.cover(positions + drafts.len(), &mut self.pools);
            count = drafts.len().min(sequence.covered(&self.pools) - positions);
            share.drafts = drafts;
            share.drafts.truncate(count);
            (rows, wanted) = (rows - count, wanted - count);
        }
    }

    /// Shares of a step that computes embeddings, of which every row is wanted.
    fn pack_embedding(&mut self) -> Vec<Share> {
        let mut shares: Vec<Share> = self.running.iter().map(|_| Share::default()).collect();
        let mut left = self.model.rows_max();
        for index in 0..self.running.len() {
            let sequence = &self.running[index];
            if !sequence.task.is_embedding()
                || sequence.task.finish.is_some()
                || sequence.evicted
                || left == 0
            {
                continue;
            }
            let count = sequence.pending().min(left);
            let count = self.reserve(index, count, &mut shares);
            if count > 0 {
                shares[index] = Share { rows: count, wanted: true, ..Share::default() };
                left -= count;
            }
        }
        shares
    }

    /// Gets pages for the next `count` rows of a sequence, from younger ones if need be, and tells for how many they are
    /// enough.
    fn reserve(&mut self, index: usize, count: usize, shares: &mut [Share]) -> usize {
        let positions = self.running[index].computed + count;
        while !self.running[index].cover(positions, &mut self.pools) {
            let Some(victim) = self.victim(index) else { break };
            let Worker { running, pools, gathered, .. } = self;
            running[victim].release(pools);
            running[victim].task.count_preemption();
            running[victim].evicted = true;
            gathered.preemptions += 1;
            shares[victim] = Share::default();
        }
        let covered = self.running[index].covered(&self.pools);
        covered.min(positions).saturating_sub(self.running[index].computed)
    }

    /// Whose pages are taken for the sequence at `index`: the youngest whose receiver is behind, else the youngest that
    /// is younger.
    fn victim(&self, index: usize) -> Option<usize> {
        let order = self.running[index].order;
        let holds = |at: &usize| *at != index && self.running[*at].holds_pages();
        let places = || (0..self.running.len()).rev().filter(holds);
        places()
            .find(|at| self.running[*at].task.room() == 0)
            .or_else(|| places().find(|at| self.running[*at].order > order))
    }

    /// Runs the model on the shares.
    fn compute(&mut self, purpose: Purpose, shares: &[Share]) -> Result<StepReport> {
        self.pools.flush(&*self.model);
        let mut rows: Vec<Row<'_>> = Vec::new();
        let mut owners: Vec<usize> = Vec::new();
        let mut tasks: Vec<&mut Task<'t>> = Vec::new();
        let Worker { model, running, gathered, .. } = self;
        for (sequence, share) in running.iter_mut().zip(shares).filter(|(_, share)| share.rows > 0) {
            let Sequence { task, pages, window_pages, computed, .. } = sequence;
            let known = &task.tokens[*computed..*computed + share.rows];
            for (offset, token) in known.iter().chain(&share.drafts).enumerate() {
                let asked = share.all_wanted || (share.wanted && offset + 1 >= share.rows);
                let wants_logits = purpose == Purpose::Embed || asked;
                let position = u32::try_from(*computed + offset).expect("a context is shorter than 2^32");
                rows.push(Row { token: *token, position, pages, window_pages, wants_logits });
                owners.push(tasks.len());
            }
            tasks.push(task);
        }
        self.batch_rows = rows.len();
        match purpose {
            Purpose::Generate => model.step(&rows, &mut |row, logits| {
                let Row { token, position, .. } = rows[row];
                tasks[owners[row]].note_prompt(position as usize, logits);
                match tasks[owners[row]].accept(position as usize, token, logits) {
                    Some(TokenTime::First(time)) => gathered.first_token.add(time),
                    Some(TokenTime::Next(time)) => gathered.inter_token.add(time),
                    None => {}
                }
            }),
            Purpose::Embed => model.embed(&rows, &mut |row, hidden| tasks[owners[row]].add_hidden(hidden)),
        }
    }

    /// Takes note of a step that went well.
    fn settle(&mut self, purpose: Purpose, shares: &[Share], before: &[usize], report: StepReport) {
        let Worker { running, pools, gathered, step, options, .. } = self;
        gathered.steps += 1;
        gathered.step_time += report.seconds;
        gathered.stall_time += report.stall;
        gathered.bytes_read += report.bytes_read;
        for ((sequence, share), before) in running.iter_mut().zip(shares).zip(before) {
            if share.rows == 0 {
                continue;
            }
            let decodes = sequence.pending() - (sequence.task.tokens.len() - before) == 1 && share.wanted;
            let rows = share.rows + share.drafts.len();
            gathered.rows += rows as u64;
            sequence.advance(rows, *step);
            if options.prefix_reuse {
                sequence.register(pools);
            }
            sequence.leave_behind(pools);
            if purpose == Purpose::Embed {
                gathered.embedded_tokens += rows as u64;
                if sequence.pending() == 0 {
                    sequence.task.finish_embedding();
                }
                continue;
            }
            let gained = (sequence.task.tokens.len() - before) as u64;
            gathered.generated_tokens += gained;
            if decodes {
                gathered.decode_rows += rows as u64;
            } else {
                gathered.prefill_tokens += share.rows as u64;
            }
            if share.wanted && gained == 0 && sequence.task.finish.is_none() {
                let what = "the model gave no logits for a row that wanted them; expected one call for each";
                sequence.task.finish = Some(FinishReason::Error(what.to_owned()));
            }
            if !share.drafts.is_empty() {
                gathered.drafted_tokens += share.drafts.len() as u64;
                gathered.accepted_tokens += sequence.task.judge_drafts(share.drafts.len(), *before) as u64;
            }
        }
    }

    /// Ends the requests of a step that failed. What their pages hold is unknown now, also to others that share them.
    fn fail(&mut self, shares: &[Share], message: &str) {
        self.gathered.steps_failed += 1;
        let (mut spoilt, mut spoilt_windows) = (Vec::new(), Vec::new());
        for (sequence, _) in self.running.iter_mut().zip(shares).filter(|(_, share)| share.rows > 0) {
            // A request whose own sampling failed keeps its own message.
            sequence.task.finish.get_or_insert_with(|| FinishReason::Error(message.to_owned()));
            spoilt.extend_from_slice(&sequence.pages);
            spoilt_windows.extend(sequence.window_pages.iter().filter(|page| **page != NO_PAGE));
        }
        for spoilt in [&mut spoilt, &mut spoilt_windows] {
            spoilt.sort_unstable();
            spoilt.dedup();
        }
        spoilt.iter().for_each(|page| self.pools.all.forget(*page));
        if let Some(windows) = &mut self.pools.windows {
            spoilt_windows.iter().for_each(|page| windows.pool.forget(*page));
        }
        let is_spoilt = |s: &Sequence<'_>| {
            s.pages.iter().any(|page| spoilt.binary_search(page).is_ok())
                || s.window_pages.iter().any(|page| spoilt_windows.binary_search(page).is_ok())
        };
        for index in (0..self.running.len()).rev() {
            let sequence = &self.running[index];
            if sequence.task.finish.is_none() && is_spoilt(sequence) {
                self.park(index);
            }
        }
    }

    /// Brings the telemetry up to date.
    fn publish(&mut self) {
        let now = Instant::now();
        if self.status_at.is_none_or(|at| now.duration_since(at) >= STATUS_INTERVAL) {
            self.status_at = Some(now);
            self.telemetry.set_model_status(self.model.status());
        }
        if let Some(spill) = &mut self.pools.spill {
            self.gathered.pages_spilled += std::mem::take(&mut spill.pages_out);
            self.gathered.pages_restored += std::mem::take(&mut spill.pages_in);
        }
        let gathered = std::mem::take(&mut self.gathered);
        self.telemetry.set_now(|state| {
            state.counters.add(&gathered);
            state.running = self.running.len();
            state.parked = self.parked.len();
            state.batch_rows = if self.running.is_empty() { 0 } else { self.batch_rows };
            state.pages_held = self.pools.all.held();
            state.pages_cached = self.pools.all.cached();
            state.pages_total = state.pages_held + self.pools.all.available();
            if let Some(windows) = &self.pools.windows {
                state.window_pages_held = windows.pool.held();
                state.window_pages_total = state.window_pages_held + windows.pool.available();
            }
        });
    }
}
