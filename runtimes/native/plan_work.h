/* What the items of a decoder's steps are, for those who run them (plan_run.c) and who look ahead (plan_ahead.c). */
#ifndef VLM_PLAN_WORK_H
#define VLM_PLAN_WORK_H

#include "plan.h"

/* The rows that a step works on, and rows in 8 bits. */
size_t plan_rows_of(const PlanCall *call, const PlanStep *step);
QuantRows plan_codes(const PlanCall *call, PlanRef ref);
/* Whether a buffer is an input of the call: its rows are [rows][tokens], of which this part of the tokens is used. */
bool plan_is_given(const PlanBuffer *b);
/* Products: their items, and what one does. */
size_t plan_product_items(const PlanCall *call, const PlanStep *step, bool *small);
void plan_product(const PlanCall *call, const PlanStep *step, size_t item, uint8_t *scratch);
size_t plan_items(void *call, size_t step, bool *small);
/* Of a product of few rows: panels, or of a gated one pairs of them, of each item. */
size_t plan_panels_per_item(const Plan *plan, const PlanStep *step);
/* As PoolJob's `ahead`. */
size_t plan_ahead(void *call, size_t step, size_t thread, PoolAhead ahead[POOL_AHEAD]);

#endif
