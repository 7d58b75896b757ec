package mirror

import (
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/consul/api"

	"kedge/deployments"
	"kedge/deployments/logtest"
	"kedge/deployments/wait"
	"kedge/kv"
	"kedge/kv/kvtest"
	"kedge/sync/git"
	"kedge/sync/git/gittest"
)

func (r *running) logs(words string) {
	r.tb.Helper()
	r.await("a log line", func() error {
		if !strings.Contains(r.log.String(), words) {
			return errors.New(words + " isn't there")
		}
		return nil
	})
}

// The mirror under default deny, with the rights that it needs and no others; without them; and while Consul is away.
func TestConsulRightsAndOutage(t *testing.T) {
	t.Parallel()
	consul := kvtest.StartConsul(t, kvtest.ConsulOptions{ACL: true})
	all := consul.Open(consul.RootToken)
	o := gittest.New(t)
	first := o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1"), "prod/web/base.yaml": unitFile("base/1")})

	poor := start(
		t,
		Config{Store: consul.Open(consul.Token(`key_prefix "kedge/" { policy = "read" }`)), Repo: o.Bare, Name: "poor"},
	)
	poor.logs("ermission denied")
	poor.stop()
	if _, err := all.Get(t.Context(), "desired/prod/web/app"); !errors.Is(err, kv.ErrNotFound) {
		t.Errorf("without rights: %v", err)
	}

	token := consul.Token(`key_prefix "kedge/" { policy = "write" } session_prefix "" { policy = "write" }`)
	store := &recorder{Store: consul.Open(token)}
	m := start(t, Config{Store: store, Repo: o.Bare})
	m.at(first)
	store.taken()

	server := consul.Servers[0]
	server.Suspend()
	second := o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/2")})
	if err := wait.For(t.Context(), 2*time.Second); err != nil {
		t.Fatal(err)
	}
	server.Resume()
	m.at(second)
	if got := m.runs("prod/web/app", "app/2"); got.Generation != 2 || got.Stable != pointer("app/1") {
		t.Errorf("after the outage: %+v", got)
	}
	if got := m.runs("prod/web/base", "base/1"); got.Generation != 1 {
		t.Errorf("after the outage: %+v", got)
	}

	// An operator's own tool.
	consul.CLI(consul.RootToken, pointer("hand/1").String()+"\n", "kv", "put", "kedge/desired/prod/web/base", "-")
	m.await("the change by hand to be put back", func() error {
		if len(store.taken()) == 0 {
			return errors.New("nothing was written")
		}
		return nil
	})
	m.runs("prod/web/base", "base/1")
}

// A node's token on the mirror's own Consul node can end the mirror's session. The mirror warns of it, and gets its
// lease back at once.
func TestAgentOnTheMirrorsConsulNode(t *testing.T) {
	t.Parallel()
	consul := kvtest.StartConsul(t, kvtest.ConsulOptions{ACL: true, Clients: []string{"web-1"}})
	node := consul.Clients[0]
	thief := consul.Token(
		deployments.ConsulRules("agent", deployments.RuleVars{Stage: "prod", Role: "web", Node: "web-1"}),
	)
	presence, err := node.Open(thief).Presence(t.Context(), "web-1")
	if err != nil {
		t.Fatal(err)
	}
	if err := presence.Put(t.Context(), "status/prod/web/web-1", []byte(`{"node":"web-1","units":{}}`)); err != nil {
		t.Fatal(err)
	}
	o := gittest.New(t)
	first := o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1")})
	m := start(
		t,
		Config{
			Store: node.Open(consul.Token(deployments.ConsulRules("mirror", deployments.RuleVars{Node: "web-1"}))),
			Repo:  o.Bare,
		},
	)
	m.store = consul.Open(consul.RootToken)
	m.at(first)
	m.logs("run mirrors on machines of their own")

	was := holder(t, consul)
	if _, err := node.Client(thief).Session().Destroy(was, nil); err != nil {
		t.Fatalf("the node's token can't end the session, and the warning is for nothing: %v", err)
	}
	m.await("another session", func() error {
		if pair, _, err := consul.Client().
			KV().
			Get(kv.DefaultPrefix+kv.MirrorLease, nil); err != nil || pair == nil || pair.Session == "" ||
			pair.Session == was {
			return fmt.Errorf("%+v, %v", pair, err)
		}
		return nil
	})
	m.at(o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/2")}))
	m.runs("prod/web/app", "app/2")
}

// A node that writes many reports that don't parse can't fill a disk.
func TestFloodOfReports(t *testing.T) {
	t.Parallel()
	log := &logtest.Buffer{}
	o := newObserver(slog.New(slog.NewTextHandler(log, nil)), func() {})
	for i := range 1000 {
		junk := []byte(strings.Repeat("x", 100_000) + strconv.Itoa(i))
		o.fleet(
			kv.View{
				Synced:  true,
				Entries: []kv.Entry{{Key: "status/prod/web/web-1", Value: junk, Version: uint64(i + 1), Session: "s"}},
			},
		)
	}
	if text := log.String(); strings.Count(text, "can't be used") != 1 || len(text) > 2*maxLogged {
		t.Errorf("%d bytes were logged: %.300s", len(text), text)
	}
}

// Entries that come and go without end are remembered in bounded number, the latest of them.
func TestFloodOfNodesThatLeft(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		o := newObserver(slog.New(slog.DiscardHandler), func() {})
		for round := range 3 {
			entries := make([]kv.Entry, maxLeft)
			for i := range entries {
				entries[i] = kv.Entry{Key: fmt.Sprintf("status/prod/web/r%d-%d", round, i), Value: []byte("{}")}
			}
			o.fleet(kv.View{Synced: true, Entries: entries})
			time.Sleep(time.Second)
		}
		o.fleet(kv.View{Synced: true})
		left, _ := o.latest().fleet.leftSince(deployments.RoleID{Stage: "prod", Role: "web"})
		if len(left) != maxLeft || len(o.left) != maxLeft || time.Since(slices.MinFunc(left, time.Time.Compare)) != 0 {
			t.Errorf("%d of %d entries are remembered, the oldest from %v", len(left), 3*maxLeft, left[0])
		}
	})
}

// A node whose report isn't read, as others fill the role, is one that has not reported: it takes room in the budget.
func TestReportsBeyondTheRolesBound(t *testing.T) {
	t.Parallel()
	log := &logtest.Buffer{}
	o := newObserver(slog.New(slog.NewTextHandler(log, nil)), func() {})
	junk := []byte(`{"units":{"app":{"state":"converged","drift":[""` + strings.Repeat(`,""`, 49_999) + `]}}}`)
	var entries []kv.Entry
	for i := range 15 {
		entries = append(entries, kv.Entry{Key: fmt.Sprintf("status/prod/web/n%02d", i), Value: junk, Session: "s"})
	}
	o.fleet(kv.View{Synced: true, Entries: entries})
	nodes := inputs{fleet: o.latest().fleet.roles}.nodes(deployments.UnitID{Stage: "prod", Role: "web", Unit: "app"})
	heard := 0
	for _, n := range nodes {
		if n.Report.State != "" {
			heard++
		}
	}
	if len(nodes) != len(entries) || heard != 9 {
		t.Errorf("of %d nodes %d are listed, and %d have reported", len(entries), len(nodes), heard)
	}
	if text := log.String(); !strings.Contains(text, "such=6") || !strings.Contains(text, "500000 units") {
		t.Errorf("it is logged: %s", text)
	}
}

// Orders that can't be obeyed, and that change without end, can't fill a disk either; their last state is logged.
func TestFloodOfOrders(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		log := &logtest.Buffer{}
		l := newLeader(&Mirror{c: Config{Log: slog.New(slog.NewTextHandler(log, nil))}}, nil)
		commit := &git.Commit{Tree: &deployments.Tree{}}
		const seconds = 100
		var seen observedOrders
		for i := range seconds * 100 {
			seen.bad = []error{fmt.Errorf("control/prod/web/app: junk %d.", i)}
			l.pendingOrders(commit, seen)
			time.Sleep(10 * time.Millisecond)
		}
		const most = badOrderBurst + seconds*time.Second/badOrderEvery
		if n := strings.Count(log.String(), "can't be obeyed"); n < badOrderBurst || n > int(most) {
			t.Errorf("%d lines were logged, at most %d should be", n, most)
		}
		time.Sleep(badOrderEvery)
		for range 10 {
			l.pendingOrders(commit, seen)
		}
		if n := strings.Count(log.String(), seen.bad[0].Error()); n != 1 {
			t.Errorf("what stands in the end was logged %d times", n)
		}
	})
}

// Keys in control/ that nobody can obey, however long and many, make short lines in the log, and stop no valid
// order.
func TestJunkOrders(t *testing.T) {
	t.Parallel()
	consul := kvtest.StartConsul(t, kvtest.ConsulOptions{ACL: true, Clients: []string{"git-1"}})
	node := consul.Clients[0]
	o := gittest.New(t)
	head := o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1") + gradual})
	m := start(
		t,
		Config{
			Store: node.Open(consul.Token(deployments.ConsulRules("mirror", deployments.RuleVars{Node: "git-1"}))),
			Repo:  o.Bare,
		},
	)
	m.store = consul.Open(consul.RootToken)
	m.at(head)
	operator := node.Client(consul.Token(deployments.ConsulRules("operator", deployments.RuleVars{}))).KV()
	put := func(key, value string) {
		t.Helper()
		if _, err := operator.Put(&api.KVPair{Key: kv.DefaultPrefix + key, Value: []byte(value)}, nil); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 20 {
		put(fmt.Sprintf("control/prod/web/junk-%d", i), strings.Repeat("x\x1b", 100_000))
		put(fmt.Sprintf("control/prod/web/app/%d/%s", i, strings.Repeat("y", 1500)), "abort")
	}
	m.logs("can't be obeyed")
	put("control/prod/web/app", "pause")
	m.logs("read an operator's order")
	for line := range strings.Lines(m.log.String()) {
		if len(line) > 2*maxLogged {
			t.Errorf("a line of %d bytes: %.200s", len(line), line)
		}
	}
}

// The time from which a unit is out of service on a node is that of the first report that says so without a break.
func TestOutages(t *testing.T) {
	t.Parallel()
	start := time.Now()
	const converged, switching, sick = deployments.StateConverged, deployments.StateSwitching, deployments.StateUnhealthy
	unit := func(s deployments.State, entered int) deployments.UnitReport {
		at := start.Add(time.Duration(entered) * time.Minute)
		return deployments.UnitReport{State: s, Since: at, RollingBack: s == switching}
	}
	var out outages
	for i, step := range []struct {
		app, db deployments.UnitReport
		want    map[string]int // since which step
	}{
		{unit(converged, 0), unit(converged, 0), nil},
		{unit(switching, 1), unit(converged, 0), map[string]int{"app": 1}},
		{unit(sick, 2), unit(sick, 2), map[string]int{"app": 1, "db": 2}},
		{unit(sick, 2), unit(sick, 3), map[string]int{"app": 1, "db": 3}}, // db was well in between
		{unit(switching, 4), unit(sick, 3), map[string]int{"app": 4, "db": 3}},
		{unit(converged, 5), unit(converged, 5), nil},
		{unit(sick, 6), unit(converged, 5), map[string]int{"app": 6}},
	} {
		units := map[string]deployments.UnitReport{"app": step.app, "db": step.db}
		out = out.next(units, start.Add(time.Duration(i)*time.Second))
		got := map[string]int{}
		for name, o := range out {
			got[name] = int(o.since.Sub(start) / time.Second)
		}
		if !maps.Equal(got, step.want) {
			t.Errorf("step %d: since %v, want %v", i, got, step.want)
		}
	}
}

// Of tens of thousands of pins and orders only those that change are parsed again, and removed ones are dropped.
func TestFloodOfPins(t *testing.T) {
	t.Parallel()
	o := newObserver(slog.New(slog.DiscardHandler), func() {})
	entries := make([]kv.Entry, 1000)
	for i := range entries {
		entries[i] = kv.Entry{Key: fmt.Sprintf("pins/prod/web/u%d", i), Value: []byte("{release: hold, by: ada}")}
	}
	view := func() int {
		count := 0
		var parse func(kv.Entry) (deployments.Pin, error)
		o.parsedPins, parse = o.parsedPins.Next(len(entries), func(value []byte) (deployments.Pin, error) {
			count++
			return deployments.ParsePin(value)
		})
		for _, e := range entries {
			if pin, err := parse(e); err != nil || pin.By == "" {
				t.Errorf("%s: %+v, %v", e.Key, pin, err)
			}
		}
		return count
	}
	if first, second := view(), view(); first != len(entries) || second != 0 {
		t.Errorf("at first %d are parsed, then %d", first, second)
	}
	entries[7].Value = []byte("{release: hold, by: bob}")
	if n := view(); n != 1 {
		t.Errorf("%d are parsed after one changed", n)
	}
	all := entries
	entries = entries[:10]
	if view(); len(o.parsedPins) != len(entries) {
		t.Errorf("%d are kept of %d", len(o.parsedPins), len(entries))
	}
	entries = all
	if n := view(); n != len(all)-10 {
		t.Errorf("%d are parsed after they came back", n)
	}
	o.pins(kv.View{Synced: true, Entries: entries})
	id := deployments.UnitID{Stage: "prod", Role: "web", Unit: "u7"}
	if pin := o.latest().pins.units[id]; !pin.Present || pin.Value.By != "bob" {
		t.Errorf("its pin is %+v", pin)
	}
}
