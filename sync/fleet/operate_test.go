package fleet

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"kedge/deployments"
	"kedge/kv"
	"kedge/kv/kvtest"
)

func TestPin(t *testing.T) {
	t.Parallel()
	s := openDir(t)
	p := release("app", "1")
	for name, c := range map[string]struct {
		node  string
		pin   deployments.Pin
		value string
	}{
		"a bare pointer":   {"", deployments.Pin{Release: p}, p.String()},
		"at once":          {"web-6", deployments.Pin{Release: p, AtOnce: true}, ""},
		"a bare hold":      {"web-1", deployments.Pin{Hold: true}, "hold"},
		"a reason":         {"web-2", deployments.Pin{Release: p, Reason: `"quoted": yes`, By: "alice"}, ""},
		"a hold until":     {"web-3", deployments.Pin{Hold: true, Until: noon}, ""},
		"a hold, by whom":  {"web-4", deployments.Pin{Hold: true, By: "bob"}, ""},
		"an odd long text": {"web-5", deployments.Pin{Hold: true, Reason: "- a: [b\n#c'"}, ""},
	} {
		if err := Pin(t.Context(), s, app, c.node, c.pin); err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		key := kv.PinKey(app)
		if c.node != "" {
			key = kv.NodePinKey(app, c.node)
		}
		e, err := s.Get(t.Context(), key)
		if err != nil {
			t.Fatal(err)
		}
		if c.value != "" && string(e.Value) != c.value {
			t.Errorf("%s: wrote %q, want %q", name, e.Value, c.value)
		}
		if got, err := deployments.ParsePin(e.Value); err != nil || got != c.pin {
			t.Errorf("%s: wrote %s, which reads as %+v, %v", name, e.Value, got, err)
		}
		if was, err := Unpin(t.Context(), s, app, c.node); err != nil || !was {
			t.Errorf("%s: unpin: %v, %v", name, was, err)
		}
		if was, err := Unpin(t.Context(), s, app, c.node); err != nil || was {
			t.Errorf("%s: a second unpin: %v, %v", name, was, err)
		}
	}
	for name, err := range map[string]error{
		"no release":      Pin(t.Context(), s, app, "", deployments.Pin{}),
		"a bad node":      Pin(t.Context(), s, app, "../x", deployments.Pin{Hold: true}),
		"a bad unit":      Pin(t.Context(), s, deployments.UnitID{Stage: "prod", Role: "web"}, "", deployments.Pin{Hold: true}),
		"a bad verb":      order(t, s, "explode"),
		"an unknown unit": order(t, s, "retry"),
	} {
		if err == nil {
			t.Errorf("%s: taken", name)
		}
	}
	if entries, err := s.List(t.Context(), ""); err != nil || len(entries) != 0 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
}

func order(t *testing.T, s kv.Store, verb string) error {
	_, err := SendOrder(t.Context(), s, app, deployments.Order{Verb: deployments.Verb(verb)})
	return err
}

func TestControl(t *testing.T) {
	t.Parallel()
	s := openDir(t)
	store(t, s, put(kv.DesiredKey(app), release("app", "1").String()))
	if err := order(t, s, "retry"); err != nil {
		t.Fatal(err)
	}
	if e, err := s.Get(t.Context(), kv.ControlKey(app)); err != nil || string(e.Value) != "retry" {
		t.Errorf("%q, %v", e.Value, err)
	}
}

// What would change nothing isn't written, and an operator hears why; of what is, what came of it.
func TestOrdersTellWhatCameOfThem(t *testing.T) {
	t.Parallel()
	s := openDir(t)
	record := func(phase deployments.Phase) kv.Entry {
		r := deployments.Record{Target: release("app", "2"), Stable: release("app", "1"), Generation: 2}
		if phase != "" {
			r.Rollout = &deployments.Progress{Phase: phase, Message: "for the test"}
		}
		return put(kv.DesiredKey(app), r)
	}
	for _, c := range []struct {
		phase deployments.Phase
		verb  string
		says  string
	}{
		{"", "promote", "no rollout is under way"},
		{"", "abort", "no rollout is under way"},
		{deployments.PhasePaused, "promote", "resume it first"},
		{deployments.PhasePaused, "pause", "paused already"},
		{deployments.PhaseRolling, "promote", "goes on already"},
		{deployments.PhaseRolling, "resume", "not paused"},
		{deployments.PhaseRolledBack, "abort", "rolled back"},
		{deployments.PhaseRollingBack, "retry", "being rolled back"},
	} {
		store(t, s, record(c.phase))
		if err := order(t, s, c.verb); err == nil || !strings.Contains(err.Error(), "would change nothing") || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s while %q: %v, want %q", c.verb, c.phase, err, c.says)
		}
		if _, err := s.Get(t.Context(), kv.ControlKey(app)); !errors.Is(err, kv.ErrNotFound) {
			t.Errorf("%s while %q was written all the same: %v", c.verb, c.phase, err)
		}
	}

	store(t, s, record(deployments.PhaseRolling))
	pause := deployments.Order{Verb: deployments.VerbPause, By: "ada", Reason: "incident 1"}
	was, err := SendOrder(t.Context(), s, app, pause)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := AwaitOutcome(t.Context(), s, app, pause, was, 10*time.Millisecond); !errors.Is(err, ErrNotTaken) {
		t.Errorf("without a mirror: %v", err)
	}
	e, err := s.Get(t.Context(), kv.ControlKey(app))
	if o, bad := deployments.ParseOrder(e.Value); err != nil || bad != nil || o != pause {
		t.Errorf("it is written as %s: %v, %v", e.Value, err, bad)
	}
	if err := s.Commit(t.Context(), nil, kv.Delete(kv.ControlKey(app))); err != nil {
		t.Fatal(err)
	}
	if _, err := AwaitOutcome(t.Context(), s, app, pause, was, time.Minute); err == nil ||
		!strings.Contains(err.Error(), "changed nothing") {
		t.Errorf("taken, and the record is as it was: %v", err)
	}
	store(t, s, record(deployments.PhasePaused))
	if says, err := AwaitOutcome(t.Context(), s, app, pause, was, time.Minute); err != nil ||
		says != "paused: for the test" {
		t.Errorf("taken: %q, %v", says, err)
	}
	store(t, s, put(kv.ControlKey(app), "abort"))
	if _, err := AwaitOutcome(t.Context(), s, app, pause, was, time.Minute); err == nil ||
		!strings.Contains(err.Error(), "another order took its place: abort") {
		t.Errorf("replaced by another: %v", err)
	}
}

// A refusal that comes with a change of the record isn't success, and is told from that of another order.
func TestOrdersRefusedWithAChange(t *testing.T) {
	t.Parallel()
	at := func(generation int64) kv.Entry {
		return put(kv.DesiredKey(app), deployments.Record{Target: release("app", "2"), Generation: generation,
			Rollout: &deployments.Progress{Phase: deployments.PhaseCanary}})
	}
	type orders = []deployments.PastOrder
	order := deployments.Order{Verb: deployments.VerbPromote, By: strings.Repeat("ada", 100),
		Reason: " it is\u202e urgent "}
	ordered := func(verb deployments.Verb, by, reason string, refused deployments.Reason) deployments.PastOrder {
		return deployments.PastOrder{At: noon, Order: deployments.Order{Verb: verb, By: deployments.PastWords(by),
			Reason: deployments.PastWords(reason)}, Refused: refused}
	}
	own := func(refused deployments.Reason) deployments.PastOrder {
		return ordered(order.Verb, order.By, order.Reason, refused)
	}
	refused, later := own(deployments.ReasonNotSeenYet), own(deployments.ReasonNotSeenYet)
	later.At = noon.Add(-time.Hour) // by the clock of another mirror
	for name, c := range map[string]struct {
		before []deployments.PastOrder // in generation 2, when the order is written
		after  map[int64]orders
		says   string
	}{
		"refused": {nil, map[int64]orders{3: {refused}}, "the order was for a rollout that has been replaced"},
		"refused afterwards": {orders{refused}, map[int64]orders{2: {refused, later}},
			"the order was for a rollout that has been replaced"},
		"an invalid pin": {nil, map[int64]orders{3: {own(deployments.ReasonInvalidPin)}}, "the pin doesn't parse"},
		"refused, and moved on": {nil, map[int64]orders{3: {refused}, 4: nil, 5: nil},
			"the order was for a rollout that has been replaced"},
		"refused in the same generation, and moved on": {orders{own("")}, map[int64]orders{2: {own(""), refused}, 3: nil},
			"the order was for a rollout that has been replaced"},
		"obeyed":                       {nil, map[int64]orders{3: {own("")}}, ""},
		"obeyed afterwards":            {nil, map[int64]orders{3: {refused, own("")}}, ""},
		"obeyed, and again for naught": {nil, map[int64]orders{3: {own("")}, 4: {refused}}, ""},
		"refused before":               {orders{refused}, map[int64]orders{2: {refused}, 3: nil}, ""},
		"another refused": {nil, map[int64]orders{3: {ordered(deployments.VerbResume, order.By, order.Reason,
			deployments.ReasonNotPaused)}}, ""},
		"another's refused": {nil, map[int64]orders{3: {ordered(order.Verb, "bob", order.Reason,
			deployments.ReasonNotSeenYet)}}, ""},
		"another reason's refused": {nil, map[int64]orders{3: {ordered(order.Verb, order.By, "",
			deployments.ReasonNotSeenYet)}}, ""},
	} {
		s := openDir(t)
		store(t, s, at(2), put(kv.HistoryKey(app, 2), deployments.History{Generation: 2, Orders: c.before}))
		was, err := SendOrder(t.Context(), s, app, order)
		if err != nil {
			t.Fatal(err)
		}
		reached := int64(2)
		for generation, taken := range c.after {
			store(t, s, put(kv.HistoryKey(app, generation), deployments.History{Generation: generation, Orders: taken}))
			reached = max(reached, generation)
		}
		store(t, s, at(reached))
		if err := s.Commit(t.Context(), nil, kv.Delete(kv.ControlKey(app))); err != nil {
			t.Fatal(err)
		}
		_, err = AwaitOutcome(t.Context(), s, app, order, was, time.Minute)
		if (err != nil) != (c.says != "") || err != nil && !strings.Contains(err.Error(), "changed nothing: "+c.says) {
			t.Errorf("%s: %v, want %q", name, err, c.says)
		}
	}
}

// denying is a store that lets nobody read single keys.
type denying struct{ kv.Store }

func (denying) Get(context.Context, string) (kv.Entry, error) { return kv.Entry{}, kv.ErrDenied }

// If the store can't be read, that is why nobody was seen to take the order.
func TestOrdersThatCannotBeFollowed(t *testing.T) {
	t.Parallel()
	order := deployments.Order{Verb: deployments.VerbPause}
	_, err := AwaitOutcome(t.Context(), denying{openDir(t)}, app, order, Before{}, 0)
	if !errors.Is(err, ErrNotTaken) || !errors.Is(err, kv.ErrDenied) {
		t.Error(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = AwaitOutcome(ctx, denying{openDir(t)}, app, order, Before{}, time.Minute)
	if !errors.Is(err, ErrNotTaken) || !errors.Is(err, kv.ErrDenied) {
		t.Error(err)
	}
}

func TestWrongNamesAreToldFromRightOnes(t *testing.T) {
	t.Parallel()
	s := openDir(t)
	id := func(name string) deployments.UnitID {
		id, err := deployments.ParseUnitID(name)
		if err != nil {
			t.Fatal(err)
		}
		return id
	}
	if err := NoUnit(t.Context(), s, app); !strings.Contains(err.Error(), "no mirror has taken a commit yet") {
		t.Error(err)
	}
	store(t, s, put(kv.MirrorKey, deployments.MirrorState{Head: first}))
	if err := NoUnit(t.Context(), s, app); !strings.HasSuffix(err.Error(), "the store has none yet") {
		t.Error(err)
	}
	store(t, s, put(kv.MirrorKey, deployments.MirrorState{Head: first, Refused: second, Error: "a typo"}))
	if err := NoUnit(t.Context(), s, app); !strings.HasSuffix(err.Error(), "; the mirror refused 222222222222: a typo") {
		t.Error(err)
	}
	store(t, s, put(kv.DesiredKey(app), release("app", "1").String()))
	if err := NoUnit(t.Context(), s, id("prod/db/main")); !strings.Contains(err.Error(), "there is only prod/web/app") {
		t.Error(err)
	}
	store(t, s, put(kv.MirrorKey, deployments.MirrorState{Head: first}))
	store(t, s, put("desired/prod/web/base", release("base", "1").String()),
		says("web-1", map[string]deployments.UnitReport{"app": runs("app", "1")}),
		put(kv.PinKey(app), "{release: hold, by: bob}"), put(kv.NodePinKey(app, "web-1"), release("app", "2").String()),
		put("pins/prod/web/old", expired("hold")), put("pins/prod/web/old/web-1", expired("hold")))
	for name, want := range map[string]string{
		"prod/web/ap":   "did you mean prod/web/app?",
		"prod/wbe/app":  "did you mean prod/web/app?",
		"prod/db/store": "there are prod/web/app, prod/web/base, prod/web/old",
	} {
		if err := NoUnit(t.Context(), s, id(name)); !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", name, err, want)
		}
	}
	for _, c := range []struct {
		filter Filter
		want   string
	}{
		{Filter{Stage: "prod"}, ""},
		{Filter{Stage: "prd"}, "did you mean prod?"},
		{Filter{Stage: "prod", Role: "wbe"}, "did you mean prod/web?"},
		{Filter{Stage: "prod", Role: "web", Unit: "aps"}, "did you mean prod/web/app?"},
	} {
		f, err := Read(t.Context(), s, c.filter)
		if err != nil {
			t.Fatal(err)
		}
		err = CheckSelected(t.Context(), s, f, c.filter)
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: %v, want %q", c.filter, err, c.want)
		}
	}
	for _, c := range []struct{ unit, node, want string }{
		{"prod/web/ap", "", "no unit prod/web/ap: did you mean prod/web/app?"},
		{"prod/web/app", "", "pinned before: hold by bob\nweb-1 has a pin of its own, which takes precedence: 2 d5856351"},
		{"prod/web/app", "web-1", "pinned before: 2 d5856351\nthe unit itself is pinned: hold by bob"},
		{"prod/web/app", "web-2", "the unit itself is pinned: hold by bob\n" +
			"prod/web/app has no node web-2: did you mean web-1?"},
		{"prod/web/base", "", ""},
		{"prod/web/old", "", "pinned before: hold until 2025-11-24 12:00 UTC, which has ended"},
		{"prod/web/old", "web-1", "pinned before: hold until 2025-11-24 12:00 UTC, which has ended"},
	} {
		if c.unit == "prod/web/ap" {
			if got := AfterUnpinNote(t.Context(), s, id(c.unit), ""); got != "" {
				t.Errorf("of a unit that isn't there: %q", got)
			}
		}
		if got := strings.Join(PinNotes(t.Context(), s, id(c.unit), c.node, nil), "\n"); got != c.want {
			t.Errorf("before a pin of %s %s:\n%s\nwant\n%s", c.unit, c.node, got, c.want)
		}
	}
}

func TestWhatCountsAfterAPin(t *testing.T) {
	t.Parallel()
	s := openDir(t)
	failed := runs("app", "1")
	failed.Quarantined = []deployments.Digest{release("app", "2").Digest}
	check := func(node, want string) {
		t.Helper()
		if got := AfterUnpinNote(t.Context(), s, app, node); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
	store(t, s, says("web-1", map[string]deployments.UnitReport{"app": failed}))
	check("", "there is no record: nodes keep what they run")
	store(t, s, put(kv.DesiredKey(app), release("app", "2").String()))
	check("", "the record counts now: 2 d5856351, which failed on web-1 before")
	check("web-2", "the record counts now: 2 d5856351")
	if got := PinnedNote(t.Context(), s, app); got != "" {
		t.Errorf("not pinned: %q", got)
	}
	two, one, three := release("app", "2"), release("app", "1"), release("app", "3")
	for want, r := range map[string]deployments.Record{
		"the record counts now: 2 d5856351, which was rolled back: nodes run 1 172dd4a0":                             {Target: two, Stable: one, Rollout: &deployments.Progress{Phase: deployments.PhaseRolledBack, Failed: two.Digest}},
		"the record counts now: 2 d5856351 on the nodes that its rollout has admitted, and 1 172dd4a0 on the others": {Target: two, Stable: one, Rollout: &deployments.Progress{Phase: deployments.PhaseCanary}},
		"the record counts now: 2 d5856351: nodes go there within max_unavailable":                                   {Target: three, Stable: two, Pinned: &deployments.Pinned{Target: two, Stable: one}},
		"the record counts now: 2 d5856351, which was rolled back: nodes go to 1 172dd4a0, within max_unavailable":   {Target: three, Stable: one, Pinned: &deployments.Pinned{Target: two, Stable: one, Failed: two.Digest}},
	} {
		store(t, s, put(kv.DesiredKey(app), r))
		check("web-2", want)
	}
	store(t, s, put(kv.DesiredKey(app), two.String()))
	store(t, s, put(kv.PinKey(app), expired("hold")))
	check("web-2", "the record counts now: 2 d5856351")
	if got := PinnedNote(t.Context(), s, app); got != "" {
		t.Errorf("no longer pinned: %q", got)
	}
	store(t, s, put(kv.PinKey(app), "{release: hold, by: bob}"))
	check("web-1", "the unit's pin counts now: hold by bob")
	if got := PinnedNote(t.Context(), s, app); !strings.Contains(got, "kedge unpin prod/web/app") {
		t.Errorf("pinned: %q", got)
	}
}

// A pin of a unit without a record is a typo, or comes too early; an order to one that has only a pin says so.
func TestPinsNeedARecord(t *testing.T) {
	t.Parallel()
	s := openDir(t)
	typo := deployments.UnitID{Stage: "prod", Role: "web", Unit: "ap"}
	store(t, s, put(kv.DesiredKey(app), release("app", "1").String()))
	if err := CheckRecord(t.Context(), s, app); err != nil {
		t.Error(err)
	}
	if err := CheckRecord(t.Context(), s, typo); err == nil || !strings.Contains(err.Error(), "did you mean prod/web/app?") {
		t.Error(err)
	}
	store(t, s, put(kv.PinKey(typo), "hold"))
	_, err := SendOrder(t.Context(), s, typo, deployments.Order{Verb: deployments.VerbPromote})
	for _, err := range []error{err, CheckRecord(t.Context(), s, typo)} {
		if err == nil || !strings.Contains(err.Error(), "has no record, only a pin") || !strings.Contains(err.Error(), "kedge unpin prod/web/ap") {
			t.Error(err)
		}
	}
}

// Without a mirror, the end of a pin that the mirror rolls out waits for one, and the end of any other pin doesn't.
func TestUnpinWithoutAMirror(t *testing.T) {
	t.Parallel()
	one := release("app", "1")
	for _, c := range []struct {
		pin   deployments.Pin
		waits bool
	}{
		{deployments.Pin{Release: one}, true},
		{deployments.Pin{Release: one, AtOnce: true}, false},
		{deployments.Pin{Hold: true}, false},
		{deployments.Pin{Release: one, Until: noon.AddDate(-1, 0, 0)}, false},
	} {
		s := openDir(t)
		store(t, s, put(kv.DesiredKey(app), deployments.Record{Target: one, Stable: one, Generation: 2, Paced: true}),
			put(kv.PinKey(app), c.pin))
		got := strings.Join(PinNotes(t.Context(), s, app, "", nil), "\n")
		if strings.Contains(got, "no mirror runs") != c.waits || strings.Contains(got, "--at-once") {
			t.Errorf("%+v: %q", c.pin, got)
		}
	}
}

// Where the mirror rolls pins out and none runs, an operator hears so, and how to go on; after a rollback that the
// mirror made by itself, that nothing will move.
func TestPinsSayWhatMoves(t *testing.T) {
	t.Parallel()
	s := openDir(t)
	one, two := release("app", "1"), release("app", "2")
	store(t, s, put(kv.DesiredKey(app), deployments.Record{Target: two, Stable: one, Generation: 2, Paced: true,
		Rollout: &deployments.Progress{Phase: deployments.PhaseRolledBack, Failed: two.Digest}}),
		says("web-1", map[string]deployments.UnitReport{"app": runs("app", "1")}))
	notes := func(pin *deployments.Pin) string { return strings.Join(PinNotes(t.Context(), s, app, "", pin), "\n") }
	if got := notes(&deployments.Pin{Release: one}); !strings.Contains(got, "no mirror runs") ||
		!strings.Contains(got, "--at-once") {
		t.Errorf("without a mirror: %q", got)
	}
	if got := notes(nil); got != "" {
		t.Errorf("unpin where nothing is pinned: %q", got)
	}
	for _, pin := range []deployments.Pin{{Release: one, AtOnce: true}, {Hold: true}} {
		if got := notes(&pin); got != "" {
			t.Errorf("%+v: %q", pin, got)
		}
	}
	store(t, s, lease())
	if got := notes(&deployments.Pin{Release: one}); got != "" {
		t.Errorf("with a mirror: %q", got)
	}
	back := "the one live node runs it already, as 2 d5856351 was rolled back before"
	if got := RunsAlreadyNote(t.Context(), s, app, one); !strings.Contains(got, back) {
		t.Errorf("%q", got)
	}
	store(t, s, put(kv.DesiredKey(app), deployments.Record{Target: one, Stable: one, Generation: 9,
		Pinned: &deployments.Pinned{Target: two, Stable: one, Failed: two.Digest}}))
	if got := RunsAlreadyNote(t.Context(), s, app, one); !strings.Contains(got, "as 2 d5856351 was rolled back before") {
		t.Errorf("after the mirror has taken the pin up: %q", got)
	}
	if got := RunsAlreadyNote(t.Context(), s, app, two); got != "" {
		t.Errorf("%q", got)
	}
	half := Unit{Live: 2, Nodes: []Node{{Name: "web-1", Report: runs("app", "1")}}}
	if half.allRun(one) {
		t.Error("a live node that isn't listed is said to run it")
	}
	if got := RunsAlreadyNote(t.Context(), full{s, []string{"pins/prod/web/"}}, app, one); got != "" {
		t.Errorf("of a fleet that isn't read completely: %q", got)
	}
}

// An operator's own token on a Consul where no mirror ever ran: pins work, as does all else that it may do.
func TestOperateOnConsulWithoutAMirror(t *testing.T) {
	t.Parallel()
	consul := kvtest.StartConsul(t, kvtest.ConsulOptions{ACL: true})
	s := consul.Open(consul.Token(deployments.ConsulRules("operator", deployments.RuleVars{})))
	if was, err := Unpin(t.Context(), s, app, ""); err != nil || was {
		t.Errorf("unpin of nothing: %v, %v", was, err)
	}
	if f, err := Read(t.Context(), s, Filter{}); err != nil || len(f.Units) > 0 || len(f.Errors) > 0 || f.CommitTaken() {
		t.Errorf("status of nothing: %+v, %v", f, err)
	}
	if err := NoUnit(t.Context(), s, app); !strings.Contains(err.Error(), "no mirror has taken a commit yet") {
		t.Error(err)
	}
	if err := Pin(t.Context(), s, app, "", deployments.Pin{Release: release("app", "1"), By: "alice"}); err != nil {
		t.Fatal(err)
	}
	f, err := Read(t.Context(), s, Filter{Stage: "prod", Role: "web"})
	if err != nil || len(f.Units) != 1 || f.Units[0].Pin == nil || f.Errors["desired/"] == "" {
		t.Errorf("%+v, %v; want the pinned unit, and that there is nothing in desired/", f, err)
	}
	until(t, fleets(t, s), "the same by watching", func(f *Fleet) bool {
		return len(f.Units) == 1 && f.Units[0].Pin != nil && f.Errors["desired/"] != "" && f.Errors["pins/"] == ""
	})
	if h, err := History(t.Context(), s, app); !errors.Is(err, kv.ErrDenied) || !errors.Is(err, kv.ErrNoFolder) {
		t.Errorf("history: %v, %v; want it told that nothing can be seen", h, err)
	}
	if was, err := Unpin(t.Context(), s, app, ""); err != nil || !was {
		t.Errorf("unpin: %v, %v", was, err)
	}
	nobody := consul.Open(consul.Token(""))
	if _, err := Read(t.Context(), nobody, Filter{}); !errors.Is(err, kv.ErrDenied) || errors.Is(err, kv.ErrEmpty) {
		t.Errorf("status without rights: %v", err)
	}
	if _, err := Unpin(t.Context(), nobody, app, ""); !errors.Is(err, kv.ErrDenied) || errors.Is(err, kv.ErrNoFolder) {
		t.Errorf("unpin without rights: %v; want it denied, not that there is no pin", err)
	}
	if err := Pin(t.Context(), nobody, app, "", deployments.Pin{Hold: true}); !errors.Is(err, kv.ErrDenied) {
		t.Errorf("pin without rights: %v", err)
	}
}

func past(version string, generation int64, stable string) kv.Entry {
	h := deployments.History{Generation: generation, Release: release("app", version), Commit: fmt.Sprintf("%040x", 0xabcdef0000+generation), At: noon.Add(time.Duration(generation) * time.Hour)}
	if stable != "" {
		h.Stable = release("app", stable)
	}
	return put(fmt.Sprintf("%s%010d", kv.HistoryPrefixOf(app), generation), h)
}

func TestHistory(t *testing.T) {
	t.Parallel()
	s := openDir(t)
	if h, err := History(t.Context(), s, app); err != nil || len(h) != 0 {
		t.Errorf("of a unit that never was: %v, %v", h, err)
	}
	store(t, s, past("1", 1, ""), past("2", 2, "1"), put(kv.HistoryPrefixOf(app)+"0000000003", "{"), past("4", 10, ""))
	h, err := History(t.Context(), s, app)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range h {
		got = append(got, fmt.Sprint(e.Generation))
	}
	if strings.Join(got, " ") != "10 3 2 1" || !strings.Contains(h[1].Note, "parse") {
		t.Errorf("%+v", h)
	}
}

func TestRollback(t *testing.T) {
	t.Parallel()
	record := func(target, stable string) kv.Entry {
		r := deployments.Record{Target: release("app", target), Generation: 3}
		if stable != "" {
			r.Stable = release("app", stable)
		}
		return put(kv.DesiredKey(app), r)
	}
	pin := func(version string) kv.Entry { return put(kv.PinKey(app), release("app", version).String()) }
	bad := func(e kv.Entry, version string) kv.Entry { // its generation knows that a release failed
		var h deployments.History
		if err := json.Unmarshal(e.Value, &h); err != nil {
			t.Fatal(err)
		}
		h.Failed = release("app", version).Digest
		return put(e.Key, h)
	}
	failed := runs("app", "1")
	failed.Quarantined = []deployments.Digest{release("app", "2").Digest}
	for name, c := range map[string]struct {
		entries []kv.Entry
		want    string // empty: none is known
	}{
		"to stable":                                       {[]kv.Entry{record("3", "2")}, "2"},
		"to what history knows":                           {[]kv.Entry{record("3", ""), past("1", 1, ""), past("2", 2, ""), past("3", 3, "")}, "2"},
		"stable comes before history":                     {[]kv.Entry{record("3", "1"), past("1", 1, ""), past("2", 2, "1"), past("3", 3, "1")}, "1"},
		"stable is what runs":                             {[]kv.Entry{record("3", "3"), past("2", 2, ""), past("3", 3, "2")}, "2"},
		"not to what failed on a node":                    {[]kv.Entry{record("3", ""), past("1", 1, ""), past("2", 2, ""), says("web-1", map[string]deployments.UnitReport{"app": failed})}, "1"},
		"not to what was rolled back":                     {[]kv.Entry{record("3", ""), past("1", 1, ""), past("2", 2, "1"), bad(past("2", 3, "1"), "2"), past("3", 4, "")}, "1"},
		"not to what had failed when it was replaced":     {[]kv.Entry{record("3", "2"), past("1", 1, ""), past("2", 2, "1"), bad(past("3", 3, "2"), "2")}, "1"},
		"to what did well once more":                      {[]kv.Entry{record("3", ""), past("1", 1, ""), bad(past("2", 2, "1"), "2"), past("2", 3, "1"), past("3", 4, "")}, "2"},
		"once more, from the pin on":                      {[]kv.Entry{record("3", "2"), past("1", 1, ""), past("2", 2, "1"), past("3", 3, "2"), pin("2")}, "1"},
		"from a pin that is nowhere else":                 {[]kv.Entry{record("3", "2"), pin("9")}, "3"},
		"from a pin that is over, as if it weren't there": {[]kv.Entry{record("3", "2"), past("1", 1, ""), past("2", 2, "1"), past("3", 3, "2"), put(kv.PinKey(app), expired(release("app", "1").String()))}, "2"},
		"from a hold, as if it weren't there":             {[]kv.Entry{record("3", "2"), put(kv.PinKey(app), "hold")}, "2"},
		"a first release has none before it":              {[]kv.Entry{record("3", "3"), past("3", 3, "")}, ""},
		"a bare pointer":                                  {[]kv.Entry{put(kv.DesiredKey(app), release("app", "1").String())}, ""},
		"no record":                                       {nil, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := openDir(t)
			store(t, s, c.entries...)
			before, _ := s.Get(t.Context(), kv.PinKey(app))
			got, err := Rollback(t.Context(), s, app, RollbackOptions{Reason: "incident 812", By: "alice"})
			after, _ := s.Get(t.Context(), kv.PinKey(app))
			if c.want == "" {
				if err == nil || string(after.Value) != string(before.Value) {
					t.Errorf("%+v, %v; want an error, and no pin", got, err)
				}
				return
			}
			want := deployments.Pin{Release: release("app", c.want), Reason: "incident 812", By: "alice"}
			written, parseErr := deployments.ParsePin(after.Value)
			if err != nil || got != want || parseErr != nil || written != want {
				t.Errorf("%+v, %v, written as %s; want %+v", got, err, after.Value, want)
			}
		})
	}
}
