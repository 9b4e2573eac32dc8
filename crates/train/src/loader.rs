//! Batches, made ahead of their use by threads of their own.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use lightering_graph::{DType, Tensor};
use lightering_meter::{MemoryPool, Reservation};
use lightering_units::Bytes;
use serde::{Deserialize, Serialize};

use crate::{Augmentation, Dataset, Feature, LABEL, Mixing, Random, TrainError};

/// Most threads that read.
pub const WORKERS_MAX: usize = 64;

/// What a random draw is for; part of its seed.
const SHUFFLE: u64 = 1;
const SAMPLE: u64 = 2;
const MIX: u64 = 3;

/// A place in the sequence of batches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Position {
    /// Pass over the data, from 0.
    pub epoch: u64,
    /// Batch within it, from 0.
    pub batch: u64,
}

/// How batches are made.
#[derive(Clone, Debug)]
pub struct LoaderOptions {
    /// Samples of a batch.
    pub batch: usize,
    /// Another order in each epoch.
    pub shuffle: bool,
    /// A last batch that is not full is left out, as is usual in training. Otherwise it is filled up with copies of its
    /// last sample, and [`Batch::samples`] tells how many count.
    pub drop_last: bool,
    /// Decides every order and every random change.
    pub seed: u64,
    /// Threads that read; at least 1.
    pub workers: usize,
    /// Batches that are made ahead.
    pub prefetch: usize,
    /// The first batch, to go on where a training stopped.
    pub start: Position,
    /// The epoch before which it ends; without end if absent.
    pub epochs: Option<u64>,
    /// Random changes of pictures.
    pub augmentation: Option<Augmentation>,
    /// Mixtures of samples; labels become probabilities.
    pub mixing: Option<Mixing>,
}

impl Default for LoaderOptions {
    fn default() -> Self {
        LoaderOptions {
            batch: 32,
            shuffle: true,
            drop_last: true,
            seed: 0,
            workers: 1,
            prefetch: 2,
            start: Position::default(),
            epochs: None,
            augmentation: None,
            mixing: None,
        }
    }
}

impl LoaderOptions {
    /// One pass in order over all samples, for evaluation.
    pub fn evaluation(batch: usize) -> LoaderOptions {
        LoaderOptions { batch, shuffle: false, drop_last: false, epochs: Some(1), ..LoaderOptions::default() }
    }
}

/// The buffers of a batch and what stands in them.
struct Slot {
    tensors: Vec<Tensor>,
    indices: Vec<u32>,
    samples: usize,
    position: Position,
}

struct State {
    free: Vec<Slot>,
    /// The batch that the next idle thread makes, and its number in the sequence.
    next: Position,
    number: u64,
    order: Vec<u32>,
    ordered: Option<u64>,
    ready: BTreeMap<u64, Result<Slot, TrainError>>,
    stopped: bool,
    died: bool,
}

struct Shared {
    dataset: Arc<dyn Dataset>,
    options: LoaderOptions,
    features: Vec<Feature>,
    per_epoch: u64,
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // No reader code runs under the lock, so the state is whole even if a thread panicked.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, guard: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(guard).unwrap_or_else(PoisonError::into_inner)
    }

    fn ended(&self, at: Position) -> bool {
        self.per_epoch == 0 || self.options.epochs.is_some_and(|end| at.epoch >= end)
    }
}

/// Batches of a data set, in an order that depends on the seed alone: not on the number of threads, not on timing.
pub struct Loader {
    shared: Arc<Shared>,
    next: Position,
    number: u64,
    threads: Vec<JoinHandle<()>>,
    _memory: Reservation,
}

/// Samples that are taken together. Dropping it gives its buffers back to the loader, which needs them to go on.
pub struct Batch {
    slot: Option<Slot>,
    shared: Arc<Shared>,
}

impl Batch {
    fn slot(&self) -> &Slot {
        self.slot.as_ref().expect("a batch has its buffers until it is dropped")
    }

    /// Where in the sequence it stands.
    pub fn position(&self) -> Position {
        self.slot().position
    }

    /// How many of its samples count; the others, at the end, are copies.
    pub fn samples(&self) -> usize {
        self.slot().samples
    }

    /// Indices of the samples that count.
    pub fn indices(&self) -> &[u32] {
        &self.slot().indices
    }

    /// The tensor of a feature, `[batch, …]`.
    pub fn tensor(&self, name: &str) -> Option<&Tensor> {
        let at = self.shared.features.iter().position(|f| f.name == name)?;
        Some(&self.slot().tensors[at])
    }

    /// All tensors with the names of their features.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.shared.features.iter().map(|f| f.name.as_str()).zip(&self.slot().tensors)
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        if let Some(slot) = self.slot.take() {
            self.shared.state().free.push(slot);
            self.shared.changed.notify_all();
        }
    }
}

impl Loader {
    /// Starts the threads. The buffers of `prefetch + 1` batches (one is in use) are asked of `pool`.
    ///
    /// # Errors
    /// The options make no sense for the data, or the pool is exhausted.
    pub fn new(
        dataset: Arc<dyn Dataset>,
        options: LoaderOptions,
        pool: &MemoryPool,
    ) -> Result<Loader, TrainError> {
        let place = "loader";
        let len = dataset.len();
        let count = u32::try_from(len)
            .map_err(|_| TrainError::limit(place, "number of samples", len as u64, u64::from(u32::MAX)))?;
        if options.batch == 0 {
            return Err(TrainError::invalid(place, "a batch of 0 samples", "at least 1"));
        }
        if options.workers == 0 || options.workers > WORKERS_MAX {
            return Err(TrainError::invalid(
                place,
                format!("{} threads", options.workers),
                format!("1 to {WORKERS_MAX}"),
            ));
        }
        let full = len / options.batch;
        let per_epoch = if options.drop_last { full } else { len.div_ceil(options.batch) } as u64;
        if per_epoch == 0 {
            return Err(TrainError::invalid(
                place,
                format!("{len} samples in batches of {}", options.batch),
                "data for at least one batch; ask for a smaller one",
            ));
        }
        if options.start.batch > per_epoch {
            return Err(TrainError::invalid(
                place,
                format!("a start at batch {} of {per_epoch}", options.start.batch),
                "a batch of the epoch (did the data or the batch size change?)",
            ));
        }
        let mut features = dataset.features().to_vec();
        if let Some(augmentation) = &options.augmentation {
            augmentation.check(&features)?;
        }
        if let Some(mixing) = &options.mixing {
            mixing.check(&features, dataset.classes())?;
            let label = features.last_mut().expect("mixing was checked against a label");
            *label = Feature::new(LABEL, DType::F32, &[dataset.classes().len()]);
        }
        let slots = options.prefetch.max(1) + 1;
        let sample = features.iter().map(Feature::size_bytes).sum::<usize>();
        let bytes = (slots * options.batch)
            .checked_mul(sample + 4)
            .and_then(|b| b.checked_add(4 * len))
            .ok_or_else(|| TrainError::invalid(place, "batches of a size that overflows", "smaller ones"))?;
        let memory = pool.reserve("batches made ahead", Bytes(bytes as u64))?;
        let slot = || Slot {
            tensors: features
                .iter()
                .map(|f| {
                    let dims: Vec<usize> =
                        std::iter::once(options.batch).chain(f.dims.iter().copied()).collect();
                    Tensor::zeros(f.dtype, &dims)
                })
                .collect(),
            indices: Vec::with_capacity(options.batch),
            samples: 0,
            position: Position::default(),
        };
        let mut start = options.start;
        if start.batch == per_epoch {
            start = Position { epoch: start.epoch + 1, batch: 0 };
        }
        let state = State {
            free: (0..slots).map(|_| slot()).collect(),
            next: start,
            number: 0,
            order: (0..count).collect(),
            ordered: None,
            ready: BTreeMap::new(),
            stopped: false,
            died: false,
        };
        let workers = options.workers;
        let shared = Arc::new(Shared {
            dataset,
            options,
            features,
            per_epoch,
            state: Mutex::new(state),
            changed: Condvar::new(),
        });
        let mut loader =
            Loader { shared: shared.clone(), next: start, number: 0, threads: Vec::new(), _memory: memory };
        for i in 0..workers {
            let shared = shared.clone();
            let thread = std::thread::Builder::new()
                .name(format!("loader {i}"))
                .spawn(move || work(&shared))
                .map_err(|source| TrainError::Io { place: "thread of the loader".into(), source })?;
            loader.threads.push(thread);
        }
        Ok(loader)
    }

    /// The tensors of a batch, each without its first dimension. With [`Mixing`] the label is `f32` `[classes]`.
    pub fn features(&self) -> &[Feature] {
        &self.shared.features
    }

    /// Batches of an epoch.
    pub fn batches_per_epoch(&self) -> u64 {
        self.shared.per_epoch
    }

    /// Where the next batch stands.
    pub fn position(&self) -> Position {
        self.next
    }

    /// The next batch; `None` at the end.
    ///
    /// # Errors
    /// A sample cannot be read, has a label that is no class, or holds infinite values. The loader has then ended.
    pub fn next_batch(&mut self) -> Result<Option<Batch>, TrainError> {
        let shared = &self.shared;
        if shared.ended(self.next) {
            return Ok(None);
        }
        let mut state = shared.state();
        let slot = loop {
            if let Some(slot) = state.ready.remove(&self.number) {
                break slot;
            }
            if state.died || state.stopped {
                return Err(TrainError::invalid(
                    "loader",
                    "a thread that reads has ended",
                    "a loader without an earlier error",
                ));
            }
            state = shared.wait(state);
        };
        if slot.is_err() {
            state.stopped = true;
            shared.changed.notify_all();
        }
        drop(state);
        let slot = slot?;
        self.number += 1;
        self.next.batch += 1;
        if self.next.batch == shared.per_epoch {
            self.next = Position { epoch: self.next.epoch + 1, batch: 0 };
        }
        Ok(Some(Batch { slot: Some(slot), shared: shared.clone() }))
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        self.shared.state().stopped = true;
        self.shared.changed.notify_all();
        for thread in self.threads.drain(..) {
            // A thread that panicked has said so already.
            let _ = thread.join();
        }
    }
}

/// Tells the others when a thread dies, so that nobody waits for it.
struct Watch<'a>(&'a Shared);

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.state().died = true;
            self.0.changed.notify_all();
        }
    }
}

fn work(shared: &Shared) {
    let _watch = Watch(shared);
    let mut scratch = Vec::new();
    loop {
        let mut state = shared.state();
        let (mut slot, number) = loop {
            if state.stopped || state.died || shared.ended(state.next) {
                return;
            }
            if let Some(slot) = state.free.pop() {
                let number = state.number;
                break (take_ticket(shared, &mut state, slot), number);
            }
            state = shared.wait(state);
        };
        drop(state);
        let result = fill(shared, &mut slot, &mut scratch).map(|()| slot);
        let mut state = shared.state();
        state.ready.insert(number, result);
        drop(state);
        shared.changed.notify_all();
    }
}

/// Notes in `slot` which samples the next batch has, and moves on. Buffer and number are taken together, so the batch
/// that everybody waits for always has a buffer.
fn take_ticket(shared: &Shared, state: &mut State, mut slot: Slot) -> Slot {
    let options = &shared.options;
    let at = state.next;
    if options.shuffle && state.ordered != Some(at.epoch) {
        (0u32..).zip(&mut state.order).for_each(|(i, o)| *o = i);
        Random::derived(options.seed, &[SHUFFLE, at.epoch]).shuffle(&mut state.order);
        state.ordered = Some(at.epoch);
    }
    let from = at.batch as usize * options.batch;
    let to = (from + options.batch).min(state.order.len());
    slot.indices.clear();
    slot.indices.extend_from_slice(&state.order[from..to]);
    slot.samples = to - from;
    slot.position = at;
    state.number += 1;
    state.next.batch += 1;
    if state.next.batch == shared.per_epoch {
        state.next = Position { epoch: at.epoch + 1, batch: 0 };
    }
    slot
}

fn fill(shared: &Shared, slot: &mut Slot, scratch: &mut Vec<f32>) -> Result<(), TrainError> {
    let options = &shared.options;
    let (dataset, source) = (&shared.dataset, shared.dataset.features());
    let classes = dataset.classes().len();
    let mixes = options.mixing.is_some();
    let mut label = [0u8; 8];
    for (i, &index) in slot.indices.iter().enumerate() {
        let index = index as usize;
        let mut random = Random::derived(options.seed, &[SAMPLE, slot.position.epoch, index as u64]);
        let mut targets: Vec<&mut [u8]> = Vec::with_capacity(source.len());
        let mut aside = Some(&mut label[..]);
        for (at, (tensor, feature)) in slot.tensors.iter_mut().zip(source).enumerate() {
            if mixes && at + 1 == source.len() {
                targets.extend(aside.take());
            } else {
                let size = feature.size_bytes();
                targets.push(&mut tensor.as_bytes_mut()[i * size..(i + 1) * size]);
            }
        }
        dataset.read(index, &mut random, &mut targets)?;
        for (at, (target, feature)) in targets.iter_mut().zip(source).enumerate() {
            match feature.dtype {
                DType::F32 => {
                    let values: &mut [f32] = bytemuck::cast_slice_mut(target);
                    if let (0, Some(augmentation)) = (at, &options.augmentation) {
                        augmentation.apply(values, &feature.dims, &mut random, scratch);
                    }
                    if let Some(normalisation) = &feature.normalisation {
                        normalisation.apply(values);
                    }
                    if let Some(at) = values.iter().position(|v| !v.is_finite()) {
                        return Err(TrainError::NonFinite {
                            place: dataset.describe(index),
                            feature: feature.name.clone(),
                            at,
                            value: values[at],
                        });
                    }
                }
                DType::I64 if classes > 0 && (feature.name == LABEL || feature.name == "tokens") => {
                    for bytes in target.chunks_exact(8) {
                        let label = i64::from_ne_bytes(bytes.try_into().expect("eight bytes"));
                        if !(0..classes as i64).contains(&label) {
                            return Err(TrainError::Label { place: dataset.describe(index), label, classes });
                        }
                    }
                }
                _ => {}
            }
        }
        if mixes {
            let row = slot.tensors.last_mut().expect("mixing was checked against a label");
            let row = &mut row.as_mut_slice::<f32>()[i * classes..(i + 1) * classes];
            row.fill(0.0);
            row[i64::from_ne_bytes(label) as usize] = 1.0;
        }
    }
    for tensor in &mut slot.tensors {
        let size = tensor.as_bytes().len() / options.batch;
        for i in slot.samples..options.batch {
            tensor.as_bytes_mut().copy_within((slot.samples - 1) * size..slot.samples * size, i * size);
        }
    }
    if let Some(mixing) = &options.mixing {
        let Position { epoch, batch } = slot.position;
        let mut random = Random::derived(options.seed, &[MIX, epoch, batch]);
        let (inputs, labels) = slot.tensors.split_at_mut(source.len() - 1);
        mixing.apply(&mut inputs[0], &mut labels[0], slot.samples, &mut random);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ArrayDataset;

    fn numbers(len: usize) -> Arc<dyn Dataset> {
        let x: Vec<f32> = (0..len).map(|i| i as f32).collect();
        let y: Vec<i64> = (0..len).map(|i| (i % 3) as i64).collect();
        let arrays = vec![
            ("features".into(), Tensor::from_slice(&[len, 1], &x)),
            (LABEL.into(), Tensor::from_slice(&[len], &y)),
        ];
        Arc::new(ArrayDataset::new(arrays, ["a", "b", "c"].map(String::from).to_vec()).unwrap())
    }

    fn rows(options: LoaderOptions, len: usize) -> Vec<(Position, usize, Vec<f32>)> {
        let mut loader = Loader::new(numbers(len), options, &MemoryPool::unbounded()).unwrap();
        let mut out = Vec::new();
        while let Some(batch) = loader.next_batch().unwrap() {
            let values = batch.tensor("features").unwrap().as_slice::<f32>().to_vec();
            let labels = batch.tensor(LABEL).unwrap().as_slice::<i64>();
            assert!(values.iter().zip(labels).all(|(x, y)| *x as i64 % 3 == *y));
            out.push((batch.position(), batch.samples(), values));
        }
        out
    }

    #[test]
    fn any_number_of_threads_gives_the_same_batches() {
        let options = |workers, prefetch| LoaderOptions {
            batch: 4,
            epochs: Some(3),
            seed: 9,
            workers,
            prefetch,
            ..LoaderOptions::default()
        };
        let one = rows(options(1, 1), 23);
        assert_eq!(one.len(), 15);
        for (workers, prefetch) in [(2, 1), (3, 5), (8, 2)] {
            assert_eq!(rows(options(workers, prefetch), 23), one);
        }
        let mut epoch: Vec<f32> = one[..5].iter().flat_map(|b| b.2.clone()).collect();
        let next: Vec<f32> = one[5..10].iter().flat_map(|b| b.2.clone()).collect();
        assert_ne!(epoch, next, "each epoch has its own order");
        epoch.sort_by(f32::total_cmp);
        epoch.dedup();
        assert_eq!(epoch.len(), 20, "no sample stands twice");
    }

    #[test]
    fn it_goes_on_anywhere() {
        let options = |start| LoaderOptions { batch: 3, epochs: Some(3), start, ..LoaderOptions::default() };
        let all = rows(options(Position::default()), 10);
        for at in 0..all.len() {
            assert_eq!(rows(options(all[at].0), 10), all[at..]);
        }
        assert_eq!(rows(options(Position { epoch: 0, batch: 3 }), 10), all[3..], "the end of an epoch");
    }

    #[test]
    fn the_last_batch_of_an_evaluation_is_filled_up() {
        let all = rows(LoaderOptions::evaluation(4), 6);
        assert_eq!(all[1], (Position { epoch: 0, batch: 1 }, 2, vec![4.0, 5.0, 5.0, 5.0]));
    }

    #[test]
    fn memory_is_asked_for_and_given_back() {
        let pool = MemoryPool::with_limit(Bytes(600));
        let options = LoaderOptions { batch: 8, ..LoaderOptions::default() };
        let loader = Loader::new(numbers(16), options.clone(), &pool).unwrap();
        assert_eq!(pool.used(), Bytes(3 * 8 * 16 + 4 * 16));
        let error = Loader::new(numbers(16), options, &pool).err().unwrap();
        assert!(matches!(error, TrainError::Budget(_)), "{error}");
        drop(loader);
        assert_eq!(pool.used(), Bytes(0));
    }

    #[test]
    fn bad_samples_are_named() {
        let set = |x: f32, y: i64| {
            let arrays = vec![
                ("features".into(), Tensor::from_slice(&[2, 1], &[0.0, x])),
                (LABEL.into(), Tensor::from_slice(&[2], &[0, y])),
            ];
            Arc::new(ArrayDataset::new(arrays, vec!["a".into(), "b".into()]).unwrap())
        };
        let error = |set| {
            let mut loader =
                Loader::new(set, LoaderOptions::evaluation(1), &MemoryPool::unbounded()).unwrap();
            assert!(loader.next_batch().unwrap().is_some());
            let error = loader.next_batch().err().unwrap();
            assert!(loader.next_batch().is_err(), "it has ended");
            error.to_string()
        };
        let label = error(set(0.0, 2));
        assert!(label.contains("sample 1: label 2 is none of the 2 classes"), "{label}");
        let nan = error(set(f32::NAN, 1));
        assert!(nan.contains("sample 1: element 0 of features is NaN"), "{nan}");
    }

    struct Panics;

    impl Dataset for Panics {
        fn len(&self) -> usize {
            4
        }
        fn features(&self) -> &[Feature] {
            &[]
        }
        fn classes(&self) -> &[String] {
            &[]
        }
        fn read(&self, _: usize, _: &mut Random, _: &mut [&mut [u8]]) -> Result<(), TrainError> {
            panic!("this source panics")
        }
    }

    #[test]
    fn nobody_waits_for_a_thread_that_died() {
        let mut loader =
            Loader::new(Arc::new(Panics), LoaderOptions::evaluation(2), &MemoryPool::unbounded()).unwrap();
        assert!(loader.next_batch().is_err());
    }
}
