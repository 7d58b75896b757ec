package fleet

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"kedge/deployments"
	"kedge/kv"
	"kedge/policy"
	"kedge/sync/fleet/message"
)

// Before is what the store held of a unit before an order was written for it.
type Before struct {
	Record kv.Entry
	// Orders are those that the history lists in the record's generation; nil: none, or they can't be read.
	Orders []deployments.PastOrder
}

// SendOrder writes an order (promote, pause, resume, abort or retry) for the mirror, and returns what the store held
// before. It doesn't write an order that would change nothing, or one for a unit without a record: the error says why.
// It replaces an order that the mirror has yet to take. It writes what one would type with `consul kv put`: a bare verb
// if nobody says who or why, else JSON.
func SendOrder(
	ctx context.Context,
	store kv.Store,
	id deployments.UnitID,
	order deployments.Order,
) (was Before, err error) {
	if err := id.Check(); err != nil {
		return was, err
	}
	value, err := encodeOrder(order)
	if err != nil {
		return was, err
	}
	verb := string(order.Verb)
	was.Record, err = store.Get(ctx, kv.DesiredKey(id))
	switch {
	case errors.Is(err, kv.ErrNotFound):
		return was, fmt.Errorf("%s: %w", verb, noRecord(ctx, store, id))
	case err != nil:
		return was, fmt.Errorf("%s %s: %w", verb, id, err)
	}
	if r, err := deployments.ParseRecord(was.Record.Value); err == nil {
		if reason, facts := policy.Refusal(verb, r); reason != "" {
			return was, fmt.Errorf("%s %s would change nothing: %s", verb, id, message.Text(reason, facts))
		}
		was.Orders = ordersIn(ctx, store, id, r.Generation)
	}
	if err := store.Commit(ctx, nil, kv.Put(kv.ControlKey(id), value)); err != nil {
		return was, fmt.Errorf("%s %s: %w", verb, id, err)
	}
	return was, nil
}

func encodeOrder(order deployments.Order) (value []byte, err error) {
	value = []byte(order.Verb)
	if order.By != "" || order.Reason != "" {
		if value, err = json.Marshal(order); err != nil {
			return nil, err
		}
	}
	_, err = deployments.ParseOrder(value)
	return value, err
}

// ErrNotTaken means that no mirror was seen to take an order in time. An untaken order stays in the store.
var ErrNotTaken = errors.New("no mirror has taken the order")

// orderPoll is the time between two checks of AwaitOutcome.
const orderPoll = 50 * time.Millisecond

// AwaitOutcome waits until the mirror has taken an order, and returns its effect in words. was is the result of
// SendOrder. The error wraps ErrNotTaken if no mirror takes the order in the time within, even if only because the
// store can't be read, or if ctx ends first. If the last try failed, the error also wraps the store's error. It is an
// error, too, if another order took this one's place, if the mirror refused it, or if the record hasn't changed or
// can't be read.
func AwaitOutcome(
	ctx context.Context,
	store kv.Store,
	id deployments.UnitID,
	order deployments.Order,
	was Before,
	within time.Duration,
) (string, error) {
	value, err := encodeOrder(order)
	if err != nil {
		return "", err
	}
	verb := string(order.Verb)
	for end := time.Now().Add(within); ; {
		there, err := store.Get(ctx, kv.ControlKey(id))
		switch {
		case errors.Is(err, kv.ErrNotFound):
			return outcomeOf(ctx, store, id, order, was)
		case err == nil && !bytes.Equal(there.Value, value):
			return "", fmt.Errorf("%s %s: another order took its place: %s", verb, id,
				clip(message.OneLine(string(there.Value)), 40))
		case time.Now().After(end):
			return "", withCause(fmt.Errorf("%s %s: %w within %s", verb, id, ErrNotTaken, within), err)
		}
		select {
		case <-ctx.Done():
			return "", withCause(fmt.Errorf("%s %s: %w yet", verb, id, ErrNotTaken), err)
		case <-time.After(orderPoll):
		}
	}
}

// withCause appends cause to err, if there is one.
func withCause(err, cause error) error {
	if cause == nil {
		return err
	}
	return fmt.Errorf("%w: %w", err, cause)
}

// outcomeOf returns the unit's state in words after an order was taken. was is the result of SendOrder. It is an error
// if the history says that the mirror refused the order, or if the record hasn't changed since or can't be read. A
// change of the record need not come from the order.
func outcomeOf(
	ctx context.Context,
	store kv.Store,
	id deployments.UnitID,
	order deployments.Order,
	was Before,
) (string, error) {
	verb := string(order.Verb)
	e, err := store.Get(ctx, kv.DesiredKey(id))
	if err != nil {
		return "", fmt.Errorf("%s %s: the mirror took the order, but its effect can't be read: %w", verb, id, err)
	}
	r, err := deployments.ParseRecord(e.Value)
	if err != nil {
		return "", fmt.Errorf("%s %s: the mirror took the order, but its effect is unknown, as the record doesn't "+
			"parse (see kedge explain): %w", verb, id, err)
	}
	if reason := refusalOf(order, ordersSince(ctx, store, id, was, r.Generation)); reason != "" {
		return "", fmt.Errorf("%s %s changed nothing: %s", verb, id,
			message.Text(reason, deployments.Facts{"order": verb}))
	}
	if e.Version == was.Record.Version {
		why := "the mirror found nothing to do"
		if reason, facts := policy.Refusal(verb, r); reason != "" {
			why = message.Text(reason, facts)
		}
		return "", fmt.Errorf("%s %s changed nothing: %s", verb, id, why)
	}
	switch {
	case r.Rollout != nil:
		return message.Progress(r.Rollout), nil
	case verb == "retry":
		return "each node on which the release failed tries it once more", nil
	}
	return "no rollout is under way any more: every node may run the target", nil
}

// ordersIn returns the orders that the history lists in one generation of a unit; nil: none, or they can't be read.
func ordersIn(ctx context.Context, store kv.Store, id deployments.UnitID, generation int64) []deployments.PastOrder {
	e, err := store.Get(ctx, kv.HistoryKey(id, generation))
	if err != nil {
		return nil
	}
	h, err := deployments.ParseHistory(e.Value)
	if err != nil {
		return nil
	}
	return h.Orders
}

// ordersSince returns the orders that the mirror took since was, oldest first. It reads the history
// from the generation of was to the generation reached, at most the newest HistoryKept generations.
// The mirror notes an order in the transaction that takes it, mostly in the generation that the
// order met or began. The record may have moved on since then.
func ordersSince(
	ctx context.Context,
	store kv.Store,
	id deployments.UnitID,
	was Before,
	reached int64,
) (all []deployments.PastOrder) {
	first := reached
	if r, err := deployments.ParseRecord(was.Record.Value); err == nil {
		first = min(reached, max(r.Generation, reached-deployments.HistoryKept+1))
	}
	for generation := first; generation <= reached; generation++ {
		all = append(all, newOrders(was.Orders, ordersIn(ctx, store, id, generation))...)
	}
	return all
}

// newOrders returns the orders in all that aren't in known. It compares the orders' times only for equality, as the
// clock of this machine or of another mirror may be ahead.
func newOrders(known, all []deployments.PastOrder) []deployments.PastOrder {
	return slices.DeleteFunc(slices.Clone(all), func(o deployments.PastOrder) bool {
		return slices.ContainsFunc(known, func(k deployments.PastOrder) bool {
			return k.At.Equal(o.At) && k.Order == o.Order && k.Refused == o.Refused
		})
	})
}

// refusalOf returns why the mirror refused an order; taken are the orders that the mirror took
// since this order was written. The result is empty if the mirror obeyed the order, or if taken
// lacks it. Orders with the same verb, author and reason can't be told apart: if the mirror obeyed
// one of them, the result is empty.
func refusalOf(order deployments.Order, taken []deployments.PastOrder) (reason deployments.Reason) {
	order.By, order.Reason = deployments.PastWords(order.By), deployments.PastWords(order.Reason)
	for _, o := range taken {
		switch {
		case o.Order != order:
		case o.Refused == "":
			return ""
		default:
			reason = o.Refused
		}
	}
	return reason
}
