/* The product that chooses tokens, with weights in 8 bits that are stored as two planes of 4: code + 128 = 16 · upper + lower.
 *
 * The upper plane is a matrix of 4 bits by itself, with its scales. Greedy decoding needs the largest logit alone: all logits are
 * computed of the upper plane, as if every lower half were 7.5, and those that may still be the largest of both planes. What the lower
 * halves change, Σ (lower − 7.5) · scale · x, is a sum of bounded terms; were they independent and of mean 0, it would exceed
 * HEAD_DEVIATIONS · sqrt(Σ (7.5 · scale · x)²) with a probability below exp(−HEAD_DEVIATIONS² / 2) = 4e-6 (Hoeffding 1963, theorem 2)
 * for a token that lies just there, and the others are further away. Every other use has all logits of both planes, bit for bit those of
 * a weight in 8 bits that is stored whole. */
#ifndef VLM_PLAN_HEAD_H
#define VLM_PLAN_HEAD_H

#include "plan.h"

#define HEAD_DEVIATIONS 5.0f
#define HEAD_CHUNKS 8       /* items of a row's STEP_REFINE */
#define HEAD_ROWS_MOST 8    /* of more rows, reading is no longer what takes the time */

/* Whether a product's weight has two planes. Its weight[2] is then the lower one: [panels][blocks · 64] of int32, whose bytes are the lower
 * halves in the order of the upper ones. */
static inline bool head_is_split(const PlanStep *step) { return step->kind == STEP_MATMUL && step->weight[2] >= 0; }

/* One panel of a split product, for all rows: of both planes; and of the upper one, with the panel's largest in out[1]. */
void head_whole(const PlanCall *call, const PlanStep *step, size_t panel, uint8_t *scratch);
void head_rough(const PlanCall *call, const PlanStep *step, size_t panel, uint8_t *scratch);
/* STEP_REFINE: of a part of the panels, those that may hold the largest logit. */
void head_refine(const PlanCall *call, const PlanStep *step, size_t item, uint8_t *scratch);
/* Keeps what plan_complete needs of each row, where a call asks for the largest logit only. */
void head_keep(const PlanCall *call);
size_t head_scratch(const Plan *plan, const PlanStep *step);

#endif
