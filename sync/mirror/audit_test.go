package mirror

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"pgregory.net/rapid"

	"kedge/deployments"
	"kedge/kv"
	"kedge/policy"
	"kedge/sync/git/gittest"
)

// The pins of a history entry follow from what the store shows, whenever a mirror compares them.
func TestFollowPins(t *testing.T) {
	t.Parallel()
	at := time.Date(2026, 5, 1, 12, 0, 0, 0, time.UTC)
	pin := func(node, by string, until time.Time) deployments.PastPin {
		return deployments.PastPin{Node: node, Pin: deployments.Pin{Hold: true, By: by, Until: until}}
	}
	stood := func(p deployments.PastPin, began, ended int) deployments.PastPin {
		p.At = at.Add(time.Duration(began) * time.Second)
		if ended > 0 {
			p.Ended = at.Add(time.Duration(ended) * time.Second)
		}
		return p
	}
	later := at.Add(time.Hour)
	ada, bob, web1 := pin("", "ada", time.Time{}), pin("", "bob", time.Time{}), pin("web-1", "ada", time.Time{})
	brief, long := pin("", "ada", at.Add(5*time.Second)), pin("", "ada", later)
	junk := deployments.PastPin{Error: "neither a pointer nor hold"}
	type list = []deployments.PastPin
	for _, c := range []struct {
		name               string
		pins, shown, after list
	}{
		{"none", nil, nil, nil},
		{"it comes", nil, list{ada}, list{stood(ada, 10, 0)}},
		{"it stays", list{stood(ada, 3, 0)}, list{ada}, list{stood(ada, 3, 0)}},
		{"it goes", list{stood(ada, 3, 0)}, nil, list{stood(ada, 3, 10)}},
		{"what ended stays", list{stood(ada, 3, 4)}, nil, list{stood(ada, 3, 4)}},
		{"it comes back", list{stood(ada, 3, 4)}, list{ada}, list{stood(ada, 3, 4), stood(ada, 10, 0)}},
		{"another takes its place", list{stood(ada, 3, 0)}, list{bob}, list{stood(ada, 3, 10), stood(bob, 10, 0)}},
		{"of a node, beside one of all", list{stood(ada, 3, 0)}, list{ada, web1}, list{stood(ada, 3, 0), stood(web1, 10, 0)}},
		{"of a node alone", list{stood(ada, 3, 0), stood(web1, 4, 0)}, list{web1},
			list{stood(ada, 3, 10), stood(web1, 4, 0)}},
		{"its time has come, and it lies there", list{stood(brief, 3, 0)}, list{brief}, list{stood(brief, 3, 5)}},
		{"its time had come while nobody looked", list{stood(brief, 3, 0)}, nil, list{stood(brief, 3, 5)}},
		{"and another came", list{stood(brief, 3, 0)}, list{bob}, list{stood(brief, 3, 5), stood(bob, 10, 0)}},
		{"it is told once that its time had come", list{stood(brief, 3, 5)}, list{brief}, list{stood(brief, 3, 5)}},
		{"it had ended before it was seen", nil, list{brief}, nil},
		{"its time is made longer", list{stood(pin("", "ada", at.Add(time.Minute)), 3, 0)}, list{long},
			list{stood(pin("", "ada", at.Add(time.Minute)), 3, 10), stood(long, 10, 0)}},
		{"it makes no sense", list{stood(ada, 3, 0)}, list{junk}, list{stood(ada, 3, 10), stood(junk, 10, 0)}},
		{"the clock went back", list{stood(ada, 20, 0)}, list{bob}, list{stood(ada, 20, 20), stood(bob, 20, 0)}},
	} {
		now := at.Add(10 * time.Second)
		got, truncated := followPins(c.pins, c.shown, now)
		if c.name == "the clock went back" { // a pin is told from others of its node by its time
			c.after[1].At = c.after[1].At.Add(time.Millisecond)
		}
		if !sameEntry(deployments.History{Pins: got}, deployments.History{Pins: c.after}) || truncated {
			t.Errorf("%s: %+v, want %+v", c.name, got, c.after)
		}
	}
}

// However pins come and go, an entry stays small, is written once for each change, and has the present pins.
func TestFollowPinsEnds(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(rt *rapid.T) {
		now := time.Date(2026, 5, 1, 12, 0, 0, 0, time.UTC)
		var entry deployments.History
		many := rapid.SampledFrom([]int{3, deployments.MaxPastPins + 20}).Draw(rt, "nodes")
		for range rapid.IntRange(1, 30).Draw(rt, "rounds") {
			now = now.Add(time.Duration(rapid.IntRange(0, 3000).Draw(rt, "ms")) * time.Millisecond)
			var shown []deployments.PastPin
			for n := range many {
				node := fmt.Sprintf("web-%d", n)
				if n == 0 {
					node = ""
				}
				if k := rapid.IntRange(0, 3).Draw(rt, "pin"); k > 0 {
					p := deployments.PastPin{Node: node, Pin: deployments.Pin{Hold: true, By: strings.Repeat("x", k)}}
					if k == 3 {
						p.Until = now.Add(time.Duration(rapid.IntRange(-1, 2).Draw(rt, "until")) * time.Second)
					}
					shown = append(shown, p)
				}
			}
			pins, truncated := followPins(entry.Pins, shown, now)
			entry.Pins, entry.Truncated = pins, entry.Truncated || truncated
			again, truncated := followPins(pins, shown, now)
			if next := (deployments.History{Pins: again, Truncated: entry.Truncated || truncated}); !sameEntry(entry, next) {
				rt.Fatalf("the same view changes it again: %+v to %+v", entry, next)
			}
			if len(pins) > deployments.MaxPastPins {
				rt.Fatalf("%d pins", len(pins))
			}
			open := openPins(pins)
			for _, p := range shown {
				has := slices.ContainsFunc(open, p.Same)
				if !p.Expired(now) != has && (has || p.Node == "" || !entry.Truncated) {
					rt.Fatalf("of %+v it says %v: %+v", p, has, open)
				}
			}
			if len(open) > len(shown) {
				rt.Fatalf("more stand than are shown: %+v of %+v", open, shown)
			}
		}
	})
}

// An entry with absurd times is updated, and can be written.
func TestFollowPinsAfterTheEndOfTime(t *testing.T) {
	t.Parallel()
	end := time.Date(9999, 12, 31, 23, 59, 59, 999_999_999, time.FixedZone("", -86340))
	was := deployments.PastPin{At: end, Pin: deployments.Pin{Hold: true, By: "ada", Until: end}}
	pins, _ := followPins([]deployments.PastPin{was}, []deployments.PastPin{{Pin: deployments.Pin{Hold: true}}},
		time.Now())
	ops := writeHistory(unitID(t, "prod/web/app"), &deployments.History{Generation: 1, Pins: pins})
	if h, err := deployments.ParseHistory(ops[0].Value); err != nil || len(h.Pins) != 2 || h.Pins[0].Ended.IsZero() {
		t.Errorf("%+v, %v", h, err)
	}
}

// Pins of very many nodes, which a token of pins/ can write, cost the mirror one pass. Comparing all for each pin
// that is dropped would take a minute here.
func TestFollowPinsOfManyNodes(t *testing.T) {
	t.Parallel()
	hold := deployments.Pin{Hold: true}
	shown := []deployments.PastPin{}
	for n := range 100_000 {
		shown = append(shown, historyPin(fmt.Sprint("web-", n), hold, nil))
	}
	shown = append(shown, historyPin("", hold, nil))
	began := time.Now()
	pins, truncated := followPins(nil, shown, time.Now())
	if took := time.Since(began); took > 15*time.Second {
		t.Errorf("it took %v", took)
	}
	if n := len(pins); n != deployments.MaxPastPins || !truncated || pins[n-1].Node != "" || pins[n-2].Node != "web-48" {
		t.Errorf("%d pins, truncated %v, at the end %+v", n, truncated, pins[n-2:])
	}
}

// The largest entry fits into a transaction, whatever its pins and orders contain.
func TestHistoryEntryFits(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 5, 1, 12, 0, 0, 0, time.UTC)
	url := "https://acme.example/m?" + strings.Repeat("&", deployments.MaxPointer-100)
	nasty := strings.Repeat("\x01<\xff", 1000)
	var shown []deployments.PastPin
	h := deployments.History{Generation: 1}
	for n := range 2 * deployments.MaxPastPins {
		pin := deployments.Pin{Release: deployments.Pointer{URL: url}, By: nasty, Reason: nasty}
		shown = append(shown, historyPin(fmt.Sprintf("%060d", n), pin, nil))
		h = withOrder(h, order{Order: deployments.Order{Verb: deployments.VerbPause, By: nasty, Reason: nasty}}, "", now)
	}
	h.Pins, _ = followPins(nil, shown, now)
	if len(h.Pins) != deployments.MaxPastPins || len(h.Orders) != deployments.MaxPastOrders {
		t.Errorf("%d pins, %d orders", len(h.Pins), len(h.Orders))
	}
	id := unitID(t, "prod/web/app")
	ops := writeHistory(id, &h)
	if size := len(ops[0].Value); size > maxBatch*3/4 {
		t.Errorf("the entry has %d bytes, a transaction takes %d", size, maxBatch)
	}
	if _, err := deployments.ParseHistory(ops[0].Value); err != nil {
		t.Error(err)
	}
}

// pastOf reads a unit's history as people see it, newest first.
func pastOf(t testing.TB, store kv.Store, unit string) (past []deployments.History) {
	t.Helper()
	entries, err := store.List(context.Background(), "history/"+unit+"/")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		h, err := deployments.ParseHistory(e.Value)
		if err != nil {
			t.Fatal(err)
		}
		past = append([]deployments.History{h}, past...)
	}
	deployments.MergePins(past)
	return past
}

// noted waits until the history of a unit has these pins: generation, node, who or the error, and + if the pin is
// open.
func (r *running) noted(unit string, want ...string) {
	r.tb.Helper()
	r.await("the pins in the history", func() error {
		var got []string
		past := pastOf(r.tb, r.store, unit)
		for _, h := range slices.Backward(past) {
			for _, p := range h.Pins {
				words := fmt.Sprintf("%d %s%s", h.Generation, p.Node, p.By)
				if p.Error != "" {
					words += "?"
				}
				if p.Ended.IsZero() {
					words += "+"
				} else if p.Ended.Before(p.At) {
					return fmt.Errorf("%+v ended before it began", p)
				}
				got = append(got, words)
			}
		}
		if !slices.Equal(got, want) {
			return fmt.Errorf("they are %q, want %q", got, want)
		}
		return nil
	})
}

// Pins of a unit without a rollout, and of single nodes, are in the history with their ends, even if no mirror ran
// then.
func TestPinsAreNoted(t *testing.T) {
	t.Parallel()
	const app = "prod/web/app"
	o := gittest.New(t)
	store := dirStore(t)
	hold := func(key, by string) { put(t, store, "pins/"+key, `{"release":"hold","by":"`+by+`"}`) }
	remove := func(key string) {
		if err := store.Commit(t.Context(), nil, kv.Delete("pins/"+key)); err != nil {
			t.Fatal(err)
		}
	}
	file := func(release string) map[string]string {
		return map[string]string{"prod/web/app.yaml": unitFile(release), "prod/web/base.yaml": unitFile("base/1")}
	}
	hold(app, "ada") // before there is a record, or a mirror
	hold("prod/web/ap", "typo")
	m := start(t, Config{Store: store, Repo: o.Bare})
	m.at(o.Push(file("app/1")))
	m.noted(app, "1 ada+")
	hold(app+"/web-1", "bob")
	m.noted(app, "1 ada+", "1 web-1bob+")
	remove(app)
	m.noted(app, "1 ada", "1 web-1bob+")

	// A new generation carries over open pins.
	m.at(o.Push(file("app/2")))
	hold(app, "eve")
	m.noted(app, "1 ada", "1 web-1bob+", "2 eve+")
	if newest := pastOf(t, store, app)[0]; newest.Generation != 2 {
		t.Errorf("a pin began generation %d", newest.Generation)
	}

	// While no mirror runs, one pin is removed, one is replaced by a bare hold, and one is added.
	m.stop()
	remove(app + "/web-1")
	put(t, store, "pins/"+app, "hold")
	hold(app+"/web-2", "kim")
	m = start(t, Config{Store: store, Repo: o.Bare, Name: "mirror-2"})
	m.noted(app, "1 ada", "1 web-1bob", "2 eve", "2 +", "2 web-2kim+")

	// A mirror of an earlier version, without pins in the history, begins a generation.
	m.stop()
	record := m.runs(app, "app/2")
	record.Generation, record.Target, record.Claim = 3, pointer("app/3"), 0
	old, err := json.Marshal(deployments.History{Generation: 3, Release: pointer("app/3"), Commit: record.Commit})
	if err != nil {
		t.Fatal(err)
	}
	ops := []kv.Op{kv.Put("desired/"+app, encode(record)), kv.Put("history/"+app+"/0000000003", old)}
	if err := store.Commit(t.Context(), nil, ops...); err != nil {
		t.Fatal(err)
	}
	remove(app + "/web-2")
	head := o.Push(file("app/3"))
	m = start(t, Config{Store: store, Repo: o.Bare})
	m.at(head)
	m.noted(app, "1 ada", "1 web-1bob", "2 eve", "2 +", "2 web-2kim")
	now := fmt.Sprintf("%d ", pastOf(t, store, app)[0].Generation) // it may have gone by the last commit for a moment

	// Junk ends the pin at that key; its text is clipped. A pin that expires ends too.
	put(t, store, "pins/"+app, "{release: nonsense "+strings.Repeat("x", 5000))
	m.noted(app, "1 ada", "1 web-1bob", "2 eve", "2 ", "2 web-2kim", now+"?+")
	for within := time.Second; ; within *= 2 { // the mirror has to see it before its time has come
		until := time.Now().Add(within).UTC()
		put(t, store, "pins/"+app, `{"release":"hold","by":"zoe","until":"`+until.Format(time.RFC3339Nano)+`"}`)
		seen := func(p deployments.PastPin) bool { return p.By == "zoe" }
		for time.Now().Before(until) && !slices.ContainsFunc(pastOf(t, store, app)[0].Pins, seen) {
			time.Sleep(2 * time.Millisecond)
		}
		if slices.ContainsFunc(pastOf(t, store, app)[0].Pins, seen) {
			break
		}
	}
	m.noted(app, "1 ada", "1 web-1bob", "2 eve", "2 ", "2 web-2kim", now+"?", now+"zoe")

	// An entry that a person deletes is made again for the next pin.
	if err := store.Commit(t.Context(), nil, kv.Delete("history/prod/web/base/0000000001")); err != nil {
		t.Fatal(err)
	}
	m.stop()
	m = start(t, Config{Store: store, Repo: o.Bare})
	hold("prod/web/base/web-1", "ada")
	m.noted("prod/web/base", "1 web-1ada+")
	if entries, err := store.List(t.Context(), "history/prod/web/ap/"); err == nil && len(entries) > 0 {
		t.Errorf("a unit without a record has a history: %d entries", len(entries))
	}
}

// Every order is in the history, with who and why, even if it changes nothing or begins a generation.
func TestOrdersAreNoted(t *testing.T) {
	t.Parallel()
	o := gittest.New(t)
	store := dirStore(t)
	m := start(t, Config{Store: store, Repo: o.Bare})
	m.at(o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1") + gradual}))
	h := newHerd(t, m, 4)
	o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/2") + gradual})
	m.runs("prod/web/app", "app/2")

	var want []string
	for _, c := range []struct {
		verb    string
		refused bool
	}{
		{"pause", false}, {"pause", true}, {"resume", false}, {"promote", false}, {"abort", false}, {"retry", false},
	} {
		if c.verb == "retry" {
			h.until(deployments.Digest{}, 2, func(r deployments.Record) bool {
				return r.Rollout != nil && r.Rollout.Phase == deployments.PhaseRolledBack
			})
		}
		put(t, store, "control/prod/web/app", "order: "+c.verb+"\nby: ada\nreason: incident "+c.verb)
		words := c.verb + " ada incident " + c.verb
		if c.refused {
			words += " refused"
		}
		want = append(want, words)
		m.await(c.verb+" in the history", func() error {
			var got []string
			for _, h := range slices.Backward(pastOf(t, store, "prod/web/app")) {
				for _, o := range h.Orders {
					words := fmt.Sprintf("%s %s %s", o.Verb, o.By, o.Order.Reason)
					if o.Refused != "" {
						words += " refused"
					}
					got = append(got, words)
				}
			}
			if !slices.Equal(got, want) {
				return fmt.Errorf("it is %q, want %q", got, want)
			}
			return nil
		})
		if _, err := store.Get(t.Context(), "control/prod/web/app"); err == nil {
			t.Errorf("%s is noted, and not taken", c.verb)
		}
	}
}

// cutOff is a store that loses the answer to the commits that consume an order once, after they succeeded.
type cutOff struct {
	kv.Store
	lost atomic.Bool
}

func (c *cutOff) Commit(ctx context.Context, lease kv.Lease, ops ...kv.Op) error {
	err := c.Store.Commit(ctx, lease, ops...)
	takes := func(op kv.Op) bool { return op.Kind == kv.OpDeleteIf && strings.HasPrefix(op.Key, kv.ControlPrefix) }
	if err == nil && slices.ContainsFunc(ops, takes) && !c.lost.Swap(true) {
		return fmt.Errorf("%w: the answer is lost", kv.ErrUnavailable)
	}
	return err
}

// An order whose answer was lost stays in the history when a pin is recorded there next.
func TestOrderSurvivesALostAnswer(t *testing.T) {
	t.Parallel()
	o := gittest.New(t)
	store := &cutOff{Store: dirStore(t)}
	m := start(t, Config{Store: store, Repo: o.Bare})
	m.at(o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1")}))
	put(t, store, "control/prod/web/app", "order: retry\nby: ada")
	m.await("the order is taken", func() error {
		if _, err := store.Get(t.Context(), "control/prod/web/app"); err == nil || !store.lost.Load() {
			return fmt.Errorf("it is there: %v", err)
		}
		return nil
	})
	put(t, store, "pins/prod/web/app", `{"release":"hold","by":"bob"}`)
	m.await("the pin in the history", func() error {
		past := pastOf(t, store, "prod/web/app")
		if len(past) == 0 || len(past[0].Pins) == 0 && (len(past) < 2 || len(past[1].Pins) == 0) {
			return fmt.Errorf("it is %+v", past)
		}
		return nil
	})
	orders := 0
	for _, h := range pastOf(t, store, "prod/web/app") {
		orders += len(h.Orders)
	}
	if orders != 1 {
		t.Errorf("%d orders stand in the history, want one", orders)
	}
}

// reads counts a mirror's reads of the store.
type reads struct {
	kv.Store
	lists, gets atomic.Int64
}

func (r *reads) List(ctx context.Context, prefix string) ([]kv.Entry, error) {
	r.lists.Add(1)
	return r.Store.List(ctx, prefix)
}

func (r *reads) Get(ctx context.Context, key string) (kv.Entry, error) {
	r.gets.Add(1)
	return r.Store.Get(ctx, key)
}

// A mirror of many units reads each role's history once, however often it is woken.
func TestNotingPinsCostsNoReads(t *testing.T) {
	t.Parallel()
	const roles, rounds = 30, 20
	o := gittest.New(t)
	store := &reads{Store: dirStore(t)}
	files := map[string]string{}
	for i := range 200 {
		files[fmt.Sprintf("prod/r%d/u%d.yaml", i%roles, i)] = unitFile("app/1")
	}
	head := o.Push(files)
	m := start(t, Config{Store: store, Repo: o.Bare})
	m.at(head)
	pin := func(by string) {
		t.Helper()
		put(t, store, "pins/prod/r29/u29", `{"release":"hold","by":"`+by+`"}`)
		m.await("the pin in the history", func() error {
			e, err := store.Store.Get(context.Background(), "history/prod/r29/u29/0000000001")
			if err != nil || !strings.Contains(string(e.Value), `"`+by+`"`) {
				return fmt.Errorf("%s: %v", e.Value, err)
			}
			return nil
		})
	}
	asks := func() int64 { return store.lists.Load() + store.gets.Load() }
	quiet := func(what string) {
		t.Helper()
		asked := asks()
		for i := range rounds {
			pin(fmt.Sprint(what, " ", i))
		}
		if more := asks() - asked; more != 0 {
			t.Errorf("%s: %d reads in %d rounds", what, more, rounds)
		}
	}
	pin("ada")
	quiet("the first mirror")

	// The next mirror reads them after its first round, a few in each round, whatever happens meanwhile.
	m.stop()
	before := store.lists.Load()
	m = start(t, Config{Store: store, Repo: o.Bare})
	m.await("all histories", func() error {
		if n := store.lists.Load() - before; n < roles+1 { // and mirror/
			return fmt.Errorf("%d were read", n)
		}
		return nil
	})
	quiet("the next mirror")
}

// An order on a unit whose entry is missing makes the entry again; with a new generation the order is in the new
// entry.
func TestNoteOrder(t *testing.T) {
	t.Parallel()
	id := unitID(t, "prod/web/app")
	now := time.Date(2026, 5, 1, 12, 0, 0, 0, time.UTC)
	o := order{Order: deployments.Order{Verb: deployments.VerbRetry, By: "ada"}, version: 3}
	w := change{unit: id, order: o, after: deployments.Record{Generation: 7, Target: pointer("1"), Commit: "c"}}
	in := inputs{now: now}
	if h := in.noteOrder(w, policy.Transition{}); h.Generation != 7 || h.Release != pointer("1") || len(h.Orders) != 1 {
		t.Errorf("without an entry: %+v", h)
	}
	in.history = map[deployments.UnitID]deployments.History{id: {Generation: 7, Orders: []deployments.PastOrder{{}}}}
	in.pastPins = map[deployments.UnitID][]deployments.PastPin{id: {{Node: "web-1"}}}
	h := in.noteOrder(w, policy.Transition{Refused: true, Reason: deployments.ReasonPaused})
	if h.Generation != 7 || len(h.Orders) != 2 || len(h.Pins) != 1 || h.Orders[1].Refused != deployments.ReasonPaused {
		t.Errorf("with the newest: %+v", h)
	}
	w.history = &deployments.History{Generation: 8}
	if h := in.noteOrder(w, policy.Transition{}); h.Generation != 8 || len(h.Orders) != 1 {
		t.Errorf("with a new one: %+v", h)
	}
}
