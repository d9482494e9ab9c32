"""Soft labels from a teacher with another tokenizer.

Both tokenizers cut text at bytes. The student's vocabulary is a trie whose edges are teacher pieces, so a student
distribution over tokens is also one over "next teacher piece, or the token ends here" at every node. Along the text
the teacher's prediction at each piece is compared with the student's at the node reached so far. Where the cuts
disagree, the remainder of the token keeps its plain label.
"""

from __future__ import annotations

import re
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-12
Visit = tuple[int, int, int, int]  # row of the student's logits, node, position of the teacher's, node just left


class Pieces:
    """A fast form of the teacher's encoder: its pieces have a space only in front, so words merge alone."""

    def __init__(self, score: dict[bytes, tuple[float, int]]) -> None:
        self.score, self.known = score, dict[str, list[tuple[int, int]]]()

    def word(self, word: str) -> list[tuple[int, int]]:
        """(id, bytes) per piece."""
        found = self.known.get(word)
        if found is not None:
            return found
        parts = [c.encode() for c in word]
        while True:
            pairs = [(self.score[a + b][0], -i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in self.score]
            if not pairs:
                break
            i = -max(pairs)[1]
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        found = []
        for p in parts:
            found += [(self.score[p][1], len(p))] if p in self.score else [(b + 3, 1) for b in p]
        self.known[word] = found
        return found

    def __call__(self, text: str) -> list[tuple[int, int]]:
        return [p for w in re.findall(r" ?[^ ]+| ", text) for p in self.word(w)]


class Trie:
    def __init__(self, tokens: list[str | None], pieces: Pieces) -> None:
        """tokens: text by token id, None where a token is no whole text (a lone byte, BOS)."""
        self.pieces, self.tokens = pieces, tokens
        self.children: list[dict[int, int]] = [{}]
        self.below: list[list[int]] = [[]]
        self.node: list[int] = [0] * len(tokens)
        for t, text in enumerate(tokens):
            at = 0
            for piece, _ in pieces(text) if text else []:
                self.below[at].append(t)
                if piece not in self.children[at]:
                    self.children[at][piece] = len(self.children)
                    self.children.append({})
                    self.below.append([])
                at = self.children[at][piece]
            self.below[at].append(t)
            self.node[t] = at
        # Per node, in one flat list each: the tokens below with their branch (a child, or 0 for ending here), and the
        # teacher piece of every child.
        tokens_of, branch_of, pieces_of = [], [], []
        for n, kids in enumerate(self.children):
            branch = {t: i + 1 for i, k in enumerate(kids.values()) for t in self.below[k]}
            tokens_of.append(self.below[n])
            branch_of.append([branch.get(t, 0) for t in self.below[n]])
            pieces_of.append([*kids.keys()])
        self.token, self.token_at = flat(tokens_of)
        self.branch, _ = flat(branch_of)
        self.piece, self.piece_at = flat(pieces_of)
        self.ends = torch.tensor([0.0 if 0 not in b else 1.0 for b in branch_of])  # does a token end at the node
        # A token ended at a node only if none of the node's children came next.
        self.allowed = torch.ones(len(self.children), len(self.children[0]))
        for n, kids in enumerate(self.children[1:], 1):
            for i, k in enumerate(self.children[0]):
                self.allowed[n, i] = float(k not in kids)
        self.first = torch.zeros(len(tokens), dtype=torch.int64)
        self.first[self.token[: self.token_at[1]]] = self.branch[: self.token_at[1]]

    def walk(self, text: str, ids: list[int], row: int) -> tuple[list[int], list[Visit], list[tuple[int, int]]]:
        """Teacher ids (behind BOS), visits, and (row, node) from where each token keeps its plain label (-1: nowhere).

        ids: the student's tokens of ``text``; row: index of the logits that predict the first of them."""
        cut = self.pieces(" " + text)
        start, at, left = {0: 0}, -1, -1
        for j, (_, size) in enumerate(cut):
            at += size
            start[at] = j + 1
        visits, hard, byte = list[Visit](), list[tuple[int, int]](), 0
        for i, t in enumerate(ids):
            piece_text = self.tokens[t]
            size = len(piece_text.encode()) if piece_text else 1
            end, node, j = byte + size, 0, start.get(byte, -1)
            follows = left >= 0 and j >= 0 and cut[j][0] not in self.children[left]
            if not follows or not piece_text or piece_text[0].isalnum():
                hard.append((row + i, 0))
                byte, left = end, self.node[t] if piece_text and end in start else -1
                continue
            at, done = byte, False
            while j < len(cut):
                piece, length = cut[j]
                inside = at + length <= end and piece in self.children[node]
                if at == end:
                    done = piece not in self.children[node]
                    if done and self.children[node]:
                        visits.append((row + i, node, j, left if node == 0 else 0))
                    break
                if not inside:
                    break
                visits.append((row + i, node, j, left if node == 0 else 0))
                node, at, j = self.children[node][piece], at + length, j + 1
            hard.append((row + i, -1 if done else node))
            byte, left = end, self.node[t] if done or end in start else -1
        return [p for p, _ in cut], visits, hard

    def loss(self, logits: Tensor, targets: Tensor, teacher: Tensor, visits: Tensor, hard: Tensor) -> Tensor:
        """Sum over tokens. logits [N, V]; targets [N]; teacher: probabilities [M, pieces]; visits [K, 4] with rows
        of both; hard [N]: the node from where the plain label counts, -1 nowhere, -2 ignored."""
        logp = F.log_softmax(logits, -1)
        probs = logp.exp()
        total = logits.new_zeros(())
        label = logp.gather(1, targets.clamp(min=0)[:, None])[:, 0]
        total = total - label[hard >= 0].sum()
        root = visits[visits[:, 1] == 0]
        kids = self.piece[: self.piece_at[1]]
        mass = torch.zeros(len(logits), len(kids) + 1).index_add(1, self.first, probs)
        want = teacher[root[:, 2]][:, kids] * self.allowed[root[:, 3]]
        rest = (teacher[root[:, 2]].sum(1) - teacher[root[:, 2]][:, kids].sum(1)).clamp(min=0)[:, None]
        want = torch.cat([rest, want], 1)
        want = want / want.sum(1, keepdim=True)
        total = total - (want * (mass[root[:, 0]] + EPS).log()).sum()
        # Deeper nodes: the student's branches, each against the mass of its node.
        deep = visits[visits[:, 1] != 0]
        owner, child = spread(self.piece_at, deep[:, 1])
        sizes = torch.bincount(owner, minlength=len(deep)) + 1
        start = sizes.cumsum(0) - sizes
        width = int(len(child) + len(deep))
        want = torch.zeros(width)
        rank = torch.arange(len(owner)) - (start[owner] - owner)
        value = teacher[deep[owner, 2], self.piece[child]]
        want[start[owner] + 1 + rank] = value
        given = torch.zeros(len(deep)).index_add(0, owner, value)
        want[start] = (1 - given).clamp(min=0) * self.ends[deep[:, 1]]
        given = given + want[start]
        entry, place = spread(self.token_at, deep[:, 1])
        share = probs[deep[entry, 0], self.token[place]]
        branch = torch.zeros(width).index_add(0, start[entry] + self.branch[place], share)
        whole = torch.zeros(len(deep)).index_add(0, entry, share)
        total = total - (want * (branch + EPS).log()).sum()
        total = total + (given * (whole + EPS).log()).sum()
        # Plain labels that count from a deeper node only.
        rows = (hard > 0).nonzero()[:, 0]
        entry, place = spread(self.token_at, hard[rows])
        whole = torch.zeros(len(rows)).index_add(0, entry, probs[rows[entry], self.token[place]])
        return total + (whole + EPS).log().sum()


def flat(lists: list[list[int]]) -> tuple[Tensor, Tensor]:
    """All entries, and where each list starts (one more entry: the end)."""
    sizes = torch.tensor([0, *(len(x) for x in lists)])
    return torch.tensor([i for x in lists for i in x], dtype=torch.int64), sizes.cumsum(0)


def spread(at: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor]:
    """For the lists of ``nodes`` in a flat list: per entry which of ``nodes`` it is of, and its place."""
    sizes = at[nodes + 1] - at[nodes]
    owner = torch.repeat_interleave(torch.arange(len(nodes)), sizes)
    before = sizes.cumsum(0) - sizes
    return owner, torch.arange(len(owner)) - before[owner] + at[nodes][owner]
