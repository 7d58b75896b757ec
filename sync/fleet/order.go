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

// SendOrder writes an order (promote, pause, resume, abort or retry) for the mirror, and returns the record from
// before. It doesn't write an order that would change nothing, or one for a unit without a record: the error says why.
// It replaces an order that the mirror has yet to take. It writes what one would type with `consul kv put`: a bare verb
// if nobody says who or why, else JSON.
func SendOrder(
	ctx context.Context,
	store kv.Store,
	id deployments.UnitID,
	order deployments.Order,
) (was kv.Entry, err error) {
	if err := id.Check(); err != nil {
		return kv.Entry{}, err
	}
	value, err := encodeOrder(order)
	if err != nil {
		return kv.Entry{}, err
	}
	verb := string(order.Verb)
	was, err = store.Get(ctx, kv.DesiredKey(id))
	switch {
	case errors.Is(err, kv.ErrNotFound):
		return was, fmt.Errorf("%s: %w", verb, noRecord(ctx, store, id))
	case err != nil:
		return was, fmt.Errorf("%s %s: %w", verb, id, err)
	}
	if r, err := deployments.ParseRecord(was.Value); err == nil {
		if reason, facts := policy.Refusal(verb, r); reason != "" {
			return was, fmt.Errorf("%s %s would change nothing: %s", verb, id, message.Text(reason, facts))
		}
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
// SendOrder. The error wraps ErrNotTaken if that takes longer than within, even because the store can't be read, or if
// ctx ends first. It wraps the store's last error, too, if the last try failed. It is also an error if another order
// took its place, if the mirror refused it, or if the record hasn't changed or can't be read.
func AwaitOutcome(
	ctx context.Context,
	store kv.Store,
	id deployments.UnitID,
	order deployments.Order,
	was kv.Entry,
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
			return outcomeOf(ctx, store, id, verb, was)
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

// outcomeOf returns the unit's state in words after an order was taken. was is its record from before. It is an error
// if the history says that the mirror refused the order, if the record hasn't changed since, or if it can't be read. A
// change needn't be the order's.
func outcomeOf(ctx context.Context, store kv.Store, id deployments.UnitID, verb string, was kv.Entry) (string, error) {
	e, err := store.Get(ctx, kv.DesiredKey(id))
	if err != nil {
		return "", fmt.Errorf("%s %s: the mirror took the order, but its effect can't be read: %w", verb, id, err)
	}
	r, err := deployments.ParseRecord(e.Value)
	if err != nil {
		return "", fmt.Errorf("%s %s: the mirror took the order, but its effect is unknown, as the record doesn't "+
			"parse (see kedge explain): %w", verb, id, err)
	}
	if reason := refusedBy(ctx, store, kv.HistoryKey(id, r.Generation), verb); reason != "" {
		return "", fmt.Errorf("%s %s changed nothing: %s", verb, id,
			message.Text(reason, deployments.Facts{"order": verb}))
	}
	if e.Version == was.Version {
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

// refusedBy returns why the mirror refused the newest order of a verb, by the history entry at key. It is empty if the
// mirror didn't refuse it, or if that is unknown. The mirror notes an order in the transaction that takes it.
func refusedBy(ctx context.Context, store kv.Store, key, verb string) deployments.Reason {
	e, err := store.Get(ctx, key)
	if err != nil {
		return ""
	}
	h, err := deployments.ParseHistory(e.Value)
	if err != nil {
		return ""
	}
	for _, o := range slices.Backward(h.Orders) {
		if string(o.Verb) == verb {
			return o.Refused
		}
	}
	return ""
}
