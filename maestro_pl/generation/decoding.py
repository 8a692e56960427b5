"""One batch of rows that are decoded together, by a loop of our own: one prefill a prompt, finished rows leave."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from maestro_pl.errors import UserError
from maestro_pl.generation.cache import GroupCache
from maestro_pl.generation.engine import Generation, Sampling
from maestro_pl.generation.sampler import Sampler, StopStrings
from maestro_pl.policy.attention import no_mask
from maestro_pl.policy.context import HiddenContext
from maestro_pl.policy.padding import greedy_slices
from maestro_pl.policy.policy import LoRAPolicy
from maestro_pl.policy.scoring import layer_index
from maestro_pl.rollout import FinishReason

PREFILL_TOKENS = 16384


class Decoding:
    """The state of one batch of rows that are decoded together.

    Tensors of all rows are indexed by row number; those named ``*_A`` belong to the rows still in the batch,
    ``rows_A``.
    """

    leave_at = 1 / 8  # rows that are through leave together, once they are this share of the batch
    cache_type: type[GroupCache] = GroupCache

    def __init__(
        self,
        policy: LoRAPolicy,
        prompts: list[list[int]],
        owners: list[int],
        sampling: Sampling,
        uniform_BL: Tensor,
        context: HiddenContext | None,
        prefill_tokens: int = PREFILL_TOKENS,
    ) -> None:
        self.prefill_tokens = prefill_tokens
        self.base, self.scorer, self.device = policy.base_model, policy.scorer, policy.device
        self.prompts, self.sampling, self.asked = prompts, sampling, context
        # what decoding itself must note; the prompt's own state comes out of the prefill
        self.context = None if context is None or context.place == "prompt" else context
        self.cache = self.cache_type([len(prompt) for prompt in prompts], owners, sampling.max_new_tokens)
        self.sampler = Sampler(sampling, policy.eos_token_ids, uniform_BL)
        self.stop = StopStrings(policy.tokenizer, sampling.stop)
        self.eos = torch.tensor(policy.eos_token_ids, device=self.device)
        self.no_mask = no_mask(self.device)
        shape = (len(owners), sampling.max_new_tokens)
        self.tokens_BL = torch.zeros(shape, dtype=torch.long, device=self.device)
        self.logps_BL, self.entropies_BL = (torch.zeros(shape, device=self.device) for _ in range(2))
        self.lengths_B = torch.zeros(len(owners), dtype=torch.long, device=self.device)
        self.stopped_B = torch.zeros(len(owners), dtype=torch.bool, device=self.device)
        self.hidden_BD: Tensor | None = None
        self.prompt_ND: Tensor | None = None
        self.report: Any = None

        self.rows_A = torch.arange(len(owners), device=self.device)
        self.begin_A = torch.tensor([len(prompts[owner]) for owner in owners], device=self.device)
        self.owners_B = self.owner_A = torch.tensor(owners, device=self.device)
        self.drawing_A = torch.ones(len(owners), dtype=torch.bool, device=self.device)  # False: has ended
        self.read_A = torch.zeros(len(owners), dtype=torch.bool, device=self.device)  # its last token was read too
        # what the host knows of these, from one look after each draw: a look makes it wait for the device
        self.drawing, self.through, self.just_ended = len(owners), 0, False

    def generation(self) -> Generation:
        """Decode every row to its end."""
        self._draw(self._prefill()[self.owner_A], 0)
        self._go_on()
        if not bool(self.logps_BL.isfinite().all()):
            raise UserError(
                "The policy's logits are not numbers, so nothing can be sampled: its parameters have diverged. Go on from an "
                "earlier checkpoint with a lower learning rate, or with policy.dtype float32."
            )
        lengths = self.lengths_B.tolist()
        inside_BL = torch.arange(self.tokens_BL.shape[1], device=self.device) < self.lengths_B.unsqueeze(1)
        reasons: list[FinishReason] = ["stop" if stopped else "length" for stopped in self.stopped_B.tolist()]
        return Generation(
            [row[:length] for row, length in zip(self.tokens_BL.tolist(), lengths, strict=True)],
            reasons,
            self.logps_BL[inside_BL],
            self.entropies_BL[inside_BL],
            self._context_states(),
        )

    def _go_on(self) -> None:
        """Read what was drawn and draw what follows, until no row is left."""
        step = 0
        while self._someone_stays():
            hidden_AD = self._read(step)
            step += 1
            if self.drawing:
                everyone = self.drawing == len(self.rows_A)
                self._draw(self.scorer.logits(self.base, hidden_AD if everyone else hidden_AD[self._places()]), step)
            else:
                self.through = len(self.rows_A)  # their last tokens have been read just now

    def _context_states(self) -> Tensor | None:
        """H of every row, as asked."""
        states = []
        if self.prompt_ND is not None:
            states.append(self.prompt_ND[self.owners_B])
        if self.hidden_BD is not None and self.context is not None:
            pooled = self.context.pool == "mean"
            states.append(self.hidden_BD / self.lengths_B.unsqueeze(1) if pooled else self.hidden_BD)
        return torch.cat(states, dim=1) if states else None

    def _prefill(self) -> Tensor:
        """Read every prompt once; the logits of its next token, (prompts, V)."""
        last, noted = [], []
        context = self.asked if self.asked is not None and self.asked.place != "terminal" else None
        layers = context is not None and context.layer != "last"
        for chosen in greedy_slices([len(prompt) for prompt in self.prompts], self.prefill_tokens):
            self.cache.begin_prefill(chosen)
            prompts = [self.prompts[i] for i in chosen]
            positions = torch.cat([torch.arange(len(prompt)) for prompt in prompts])
            output = self._backbone(torch.tensor([token for prompt in prompts for token in prompt]), positions, layers)
            ends = (torch.tensor([len(prompt) for prompt in prompts]).cumsum(0) - 1).to(self.device)
            last.append(output.last_hidden_state[0, ends])
            if context is not None:
                states = output.hidden_states
                noted.append(states[layer_index(context, states)][0, ends].float() if layers else last[-1].float())
        self.prompt_ND = torch.cat(noted) if noted else None
        self.cache.begin_decoding(self.device)
        return self.scorer.logits(self.base, torch.cat(last))

    def _backbone(self, ids_T: Tensor, positions_T: Tensor, layers: bool = False) -> Any:
        return self.scorer.backbone(
            self.base,
            layers,
            input_ids=ids_T.unsqueeze(0).to(self.device),
            position_ids=positions_T.unsqueeze(0).to(self.device),
            attention_mask=self.no_mask,
            layout=self.cache,
        )

    def _draw(self, logits_AV: Tensor, step: int) -> None:
        """Draw token number ``step`` of the rows that have not ended, and see which of them it ends."""
        places = self._places()
        rows = self.rows_A[places]
        drawn = self.sampler.draw(logits_AV, rows, step)
        self.tokens_BL[rows, step] = drawn.tokens
        self.logps_BL[rows, step], self.entropies_BL[rows, step] = drawn.logps, drawn.entropies
        self.lengths_B[rows] += 1
        ended = self._ends(drawn.tokens)
        if self.stop:
            ended |= self.stop.ends(self.tokens_BL[rows, : step + 1])
        self.stopped_B[rows] = ended
        if step + 1 == self.sampling.max_new_tokens:
            ended = torch.ones_like(ended)
        self.drawing_A = self.drawing_A.index_copy(0, places, ~ended)
        look = torch.stack([self.drawing_A.sum(), self._through_A().sum(), ended.sum()])
        self.drawing, self.through, just_ended = look.tolist()
        self.just_ended = just_ended > 0  # only then a last token is read next

    def _ends(self, tokens_A: Tensor) -> Tensor:
        """Which tokens end a response; not torch.isin, which sorts, and makes the host wait, for ten of them and more."""
        return (tokens_A.unsqueeze(1) == self.eos).any(1)

    def _places(self) -> Tensor:
        """Where in the batch the rows are that have not ended."""
        return torch.nonzero_static(self.drawing_A, size=self.drawing).squeeze(1)

    def _through_A(self) -> Tensor:
        """Rows of which nothing is left to do."""
        return ~self.drawing_A if self.context is None else ~self.drawing_A & self.read_A

    def _someone_stays(self) -> bool:
        """Let rows that are through leave the batch; False when none is left."""
        if self.report is not None and self.through:
            self.report(len(self.lengths_B) - len(self.rows_A) + self.through)
        left = len(self.rows_A) - self.through
        if not left:
            return False
        if self.through >= self.leave_at * len(self.rows_A):
            keep = torch.nonzero_static(~self._through_A(), size=left).squeeze(1)
            self.cache.keep(keep)
            for name in ("rows_A", "begin_A", "owner_A", "drawing_A", "read_A"):
                setattr(self, name, getattr(self, name)[keep])
            self.through = 0
        return True

    def _read(self, step: int) -> Tensor:
        """Feed token number ``step`` of every row in the batch; hidden states (A, D), the context's noted on the way."""
        tokens_A = self.tokens_BL[self.rows_A, step]  # rows that are through read a token 0 that nobody looks at
        layers = self.context is not None and self.context.layer != "last"
        output = self._backbone(tokens_A, self.begin_A + step, layers)
        hidden_AD: Tensor = output.last_hidden_state[0]
        if self.context is not None and (self.just_ended or self.context.pool == "mean"):
            self._note(output, hidden_AD, step)
        return hidden_AD

    def _note(self, output: Any, hidden_AD: Tensor, step: int | Tensor) -> None:
        """Keep of the states of token number ``step`` what the context is made of."""
        assert self.context is not None
        states = output.hidden_states
        chosen = hidden_AD if states is None else states[layer_index(self.context, states)][0]
        chosen_AD = chosen.float()
        if self.hidden_BD is None:
            self.hidden_BD = torch.zeros(len(self.lengths_B), chosen_AD.shape[1], device=self.device)
        lengths_A, before_AD = self.lengths_B[self.rows_A], self.hidden_BD[self.rows_A]
        if self.context.pool == "mean":
            noted_A1, after_AD = (lengths_A > step).unsqueeze(1), before_AD + chosen_AD
        else:
            noted_A1, after_AD = (lengths_A == step + 1).unsqueeze(1), chosen_AD
        self.hidden_BD[self.rows_A] = torch.where(noted_A1, after_AD, before_AD)
        self.read_A.copy_(~self.drawing_A)
