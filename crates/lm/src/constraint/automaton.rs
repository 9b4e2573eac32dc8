//! The pushdown automaton of a grammar, and its states as they are met.

use std::sync::Arc;

use regex_syntax::utf8::Utf8Sequences;

use crate::tokenizer::Map;
use crate::{Error, Result};

use super::expression::{Expression, Rules};

/// The most places of an automaton.
const NODES_MAX: usize = 1 << 20;
/// The most places where a text can stand at once.
const CONFIGURATIONS_MAX: usize = 1 << 14;
/// The deepest nesting; a text that nests deeper does not keep to any grammar.
const DEPTH_MAX: u32 = 256;
/// So many states are remembered before starting afresh,
const STATES_MAX: usize = 1 << 13;
/// and so many places in all of them together.
const REMEMBERED_MAX: usize = 1 << 21;
/// So many places may be looked at for one token.
const WORK_MAX: usize = 1 << 22;
/// The deepest nesting of expressions.
const EXPRESSION_DEPTH_MAX: usize = 200;

type NodeId = u32;

/// A place in the automaton.
#[derive(Debug, Clone)]
enum Node {
    /// Takes one byte of a range.
    Byte { lowest: u8, highest: u8, next: NodeId },
    /// Goes on in all of these.
    Split(Vec<NodeId>),
    /// Goes through a rule, then on.
    Call { rule: usize, next: NodeId },
    /// Goes on where the rule was called; at the outermost level the text may end.
    Return,
}

/// An automaton.
#[derive(Debug)]
pub(super) struct Program {
    nodes: Vec<Node>,
    /// Where each rule begins.
    rules: Vec<NodeId>,
    start: NodeId,
}

/// The place of `Node::Return`, which all rules share.
const RETURN: NodeId = 0;

impl Program {
    pub fn new(root: &Expression, rules: Rules) -> Result<Program> {
        let mut program =
            Program { nodes: vec![Node::Return], rules: vec![RETURN; rules.len()], start: RETURN };
        for (index, expression) in rules.into_expressions().into_iter().enumerate() {
            let expression = expression.expect("every declared rule is defined");
            program.rules[index] = program.compile(&expression, RETURN, 0)?;
        }
        program.start = program.compile(root, RETURN, 0)?;
        Ok(program)
    }

    fn add(&mut self, node: Node) -> Result<NodeId> {
        if self.nodes.len() >= NODES_MAX {
            return Err(Error::limit(
                "grammar",
                "its size in places",
                NODES_MAX as u64 + 1,
                NODES_MAX as u64,
            ));
        }
        self.nodes.push(node);
        Ok(self.nodes.len() as NodeId - 1)
    }

    /// The place where `expression` begins, given where it goes on.
    fn compile(&mut self, expression: &Expression, next: NodeId, depth: usize) -> Result<NodeId> {
        if depth > EXPRESSION_DEPTH_MAX {
            let limit = EXPRESSION_DEPTH_MAX as u64;
            return Err(Error::limit("grammar", "its nesting", limit + 1, limit));
        }
        match expression {
            Expression::Literal(bytes) => bytes
                .iter()
                .rev()
                .try_fold(next, |next, byte| self.add(Node::Byte { lowest: *byte, highest: *byte, next })),
            Expression::Characters(class) => {
                let mut ways = Vec::new();
                for range in class.ranges() {
                    for sequence in Utf8Sequences::new(range.start(), range.end()) {
                        let way = sequence.as_slice().iter().rev().try_fold(next, |next, bytes| {
                            self.add(Node::Byte { lowest: bytes.start, highest: bytes.end, next })
                        })?;
                        ways.push(way);
                    }
                }
                self.split(ways)
            }
            Expression::Sequence(parts) => {
                parts.iter().rev().try_fold(next, |next, part| self.compile(part, next, depth + 1))
            }
            Expression::Choice(parts) => {
                let ways =
                    parts.iter().map(|part| self.compile(part, next, depth + 1)).collect::<Result<_>>()?;
                self.split(ways)
            }
            Expression::Rule(rule) => self.add(Node::Call { rule: *rule, next }),
            Expression::Repeat(inner, least, most) => {
                // What is repeated often becomes a rule, so that it is there once.
                let copies = most.unwrap_or(*least).max(*least);
                if copies as usize > NODES_MAX {
                    return Err(Error::limit(
                        "grammar",
                        "a number of repetitions",
                        u64::from(copies),
                        NODES_MAX as u64,
                    ));
                }
                let called;
                let inner = if copies > 1 && !matches!(**inner, Expression::Rule(_) | Expression::Literal(_))
                {
                    let entry = self.compile(inner, RETURN, depth + 1)?;
                    self.rules.push(entry);
                    called = Expression::Rule(self.rules.len() - 1);
                    &called
                } else {
                    inner
                };
                let mut at = match most {
                    Some(most) => {
                        let mut at = next;
                        for _ in *least..*most {
                            let way = self.compile(inner, at, depth + 1)?;
                            at = self.split(vec![way, next])?;
                        }
                        at
                    }
                    None => {
                        let again = self.split(Vec::new())?;
                        let way = self.compile(inner, again, depth + 1)?;
                        self.nodes[again as usize] = Node::Split(vec![way, next]);
                        again
                    }
                };
                for _ in 0..*least {
                    at = self.compile(inner, at, depth + 1)?;
                }
                Ok(at)
            }
        }
    }

    fn split(&mut self, ways: Vec<NodeId>) -> Result<NodeId> {
        if let [way] = ways[..] {
            return Ok(way);
        }
        self.add(Node::Split(ways))
    }
}

/// A set of places where a text can stand.
pub(super) type StateId = u32;

/// The state of a text that can no longer keep to the grammar.
pub(super) const DEAD: StateId = 0;

/// No way has been looked for yet.
const UNKNOWN: StateId = StateId::MAX;

/// The number of an interned stack of places to return to; 0 is the empty one.
type StackId = u32;

#[derive(Debug, Clone, Copy)]
struct Stack {
    to: NodeId,
    below: StackId,
    depth: u32,
}

/// A place in a grammar and where to return to.
type Configuration = (NodeId, StackId);

#[derive(Debug, Clone)]
struct State {
    configurations: Arc<[Configuration]>,
    /// Where each byte leads, as far as that is known.
    ways: Option<Box<[StateId; 256]>>,
    accepts: bool,
}

/// The states of a program, made when they are first met.
#[derive(Debug, Clone)]
pub(super) struct Automaton {
    program: Arc<Program>,
    states: Vec<State>,
    known: Map<Arc<[Configuration]>, StateId>,
    stacks: Vec<Stack>,
    known_stacks: Map<(NodeId, StackId), StackId>,
    todo: Vec<Configuration>,
    seen: std::collections::HashSet<Configuration, foldhash::fast::RandomState>,
    /// Places in all states together.
    remembered: usize,
    /// Places looked at since the last call of `begin_work`.
    work: usize,
}

impl Automaton {
    pub fn new(program: Arc<Program>) -> Automaton {
        let mut automaton = Automaton {
            program,
            states: Vec::new(),
            known: Map::default(),
            stacks: Vec::new(),
            known_stacks: Map::default(),
            todo: Vec::new(),
            seen: std::collections::HashSet::default(),
            remembered: 0,
            work: 0,
        };
        automaton.clear();
        automaton
    }

    fn clear(&mut self) {
        self.states.clear();
        self.known.clear();
        self.remembered = 0;
        self.stacks.clear();
        self.known_stacks.clear();
        self.stacks.push(Stack { to: RETURN, below: 0, depth: 0 });
        let nowhere: Arc<[Configuration]> = Arc::new([]);
        self.known.insert(Arc::clone(&nowhere), DEAD);
        self.states.push(State { configurations: nowhere, ways: None, accepts: false });
    }

    pub fn start(&mut self) -> Result<StateId> {
        self.todo.push((self.program.start, 0));
        self.closure()
    }

    pub fn accepts(&self, state: StateId) -> bool {
        self.states[state as usize].accepts
    }

    /// Whether it is time for [`Automaton::restart`].
    pub fn is_crowded(&self) -> bool {
        self.states.len() > STATES_MAX || self.remembered > REMEMBERED_MAX
    }

    /// What is done for one token is bounded from here on.
    pub fn begin_work(&mut self) {
        self.work = 0;
    }

    /// Forgets all states but this one, and gives its new number.
    pub fn restart(&mut self, state: StateId) -> Result<StateId> {
        let configurations = Arc::clone(&self.states[state as usize].configurations);
        let stacks = std::mem::take(&mut self.stacks);
        self.clear();
        for (node, stack) in configurations.iter() {
            let mut returns = Vec::new();
            let mut at = *stack;
            while at != 0 {
                returns.push(stacks[at as usize].to);
                at = stacks[at as usize].below;
            }
            let stack = returns.iter().rev().fold(0, |below, to| self.push(*to, below));
            self.todo.push((*node, stack));
        }
        self.closure()
    }

    /// The state behind `byte`.
    pub fn step(&mut self, state: StateId, byte: u8) -> Result<StateId> {
        if let Some(ways) = &self.states[state as usize].ways {
            let next = ways[usize::from(byte)];
            if next != UNKNOWN {
                return Ok(next);
            }
        }
        let configurations = Arc::clone(&self.states[state as usize].configurations);
        for (node, stack) in configurations.iter() {
            if let Node::Byte { lowest, highest, next } = &self.program.nodes[*node as usize]
                && (*lowest..=*highest).contains(&byte)
            {
                self.todo.push((*next, *stack));
            }
        }
        let next = self.closure()?;
        let ways = self.states[state as usize].ways.get_or_insert_with(|| Box::new([UNKNOWN; 256]));
        ways[usize::from(byte)] = next;
        Ok(next)
    }

    /// The stack with `to` on top of `below`.
    fn push(&mut self, to: NodeId, below: StackId) -> StackId {
        *self.known_stacks.entry((to, below)).or_insert_with(|| {
            let depth = self.stacks[below as usize].depth + 1;
            self.stacks.push(Stack { to, below, depth });
            self.stacks.len() as StackId - 1
        })
    }

    /// The state of everything that can be reached from `todo` without a byte.
    fn closure(&mut self) -> Result<StateId> {
        let program = Arc::clone(&self.program);
        self.seen.clear();
        let mut found: Vec<Configuration> = Vec::new();
        let mut accepts = false;
        while let Some(configuration) = self.todo.pop() {
            if !self.seen.insert(configuration) {
                continue;
            }
            if self.seen.len() > CONFIGURATIONS_MAX {
                self.todo.clear();
                let limit = CONFIGURATIONS_MAX as u64;
                return Err(Error::limit(
                    "grammar",
                    "the number of possibilities at one place",
                    limit + 1,
                    limit,
                ));
            }
            let (node, stack) = configuration;
            match &program.nodes[node as usize] {
                Node::Byte { .. } => found.push(configuration),
                Node::Split(ways) => self.todo.extend(ways.iter().map(|way| (*way, stack))),
                Node::Call { rule, next } => {
                    let entry = program.rules[*rule];
                    if *next == RETURN {
                        // Nothing to come back for: the rule returns where this one would.
                        self.todo.push((entry, stack));
                    } else if self.stacks[stack as usize].depth < DEPTH_MAX {
                        let stack = self.push(*next, stack);
                        self.todo.push((entry, stack));
                    }
                }
                Node::Return if stack == 0 => {
                    accepts = true;
                    found.push(configuration);
                }
                Node::Return => {
                    let Stack { to, below, .. } = self.stacks[stack as usize];
                    self.todo.push((to, below));
                }
            }
        }
        self.work += self.seen.len();
        if self.work > WORK_MAX {
            let limit = WORK_MAX as u64;
            return Err(Error::limit(
                "grammar",
                "the number of possibilities for one token",
                limit + 1,
                limit,
            ));
        }
        found.sort_unstable();
        let found: Arc<[Configuration]> = found.into();
        if let Some(state) = self.known.get(&found) {
            return Ok(*state);
        }
        let state = self.states.len() as StateId;
        self.remembered += found.len();
        self.known.insert(Arc::clone(&found), state);
        self.states.push(State { configurations: found, ways: None, accepts });
        Ok(state)
    }
}
