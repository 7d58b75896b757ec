package fleet

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"kedge/deployments"
	"kedge/kv"
	"kedge/policy"
)

var update = flag.Bool("update", false, "write the golden files anew")

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	file := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(file, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s: got\n%s\nwant\n%s", name, got, want)
	}
}

func TestTable(t *testing.T) {
	t.Parallel()
	f := Assemble(busyFleet(), noon)
	rolling := Assemble([]kv.Entry{
		put(kv.DesiredKey(app), deployments.Record{Target: release("app", "1.4.2"), Stable: release("app", "1.4.1"), Generation: 2,
			Rollout: &deployments.Progress{Phase: deployments.PhaseRolledBack, Since: noon, Message: "1 of 3 nodes failed, 0 are allowed", Failed: release("app", "1.4.2").Digest}}),
	}, noon)
	same := runs("app", "1.4.1") // three nodes that say the same, and a fourth
	same.State, same.Want, same.Quarantined, same.Error = deployments.StateQuarantined, release("app", "1.4.2"), []deployments.Digest{release("app", "1.4.2").Digest},
		"release "+release("app", "1.4.2").String()+" failed in post: exit status 1"
	other := same
	other.Error = "release " + release("app", "1.4.2").String() + " failed in health: 503"
	alike := Assemble([]kv.Entry{
		put(kv.MirrorKey, deployments.MirrorState{Holder: "mirror-1", Head: "4f2c91ab77d0c0ffee00c0ffee00c0ffee00c0ff", At: noon}), // nobody holds the lease
		put(kv.DesiredKey(app), deployments.Record{Target: release("app", "1.4.2"), Stable: release("app", "1.4.1"), Generation: 2}),
		says("web-1", map[string]deployments.UnitReport{"app": same}), says("web-2", map[string]deployments.UnitReport{"app": same}),
		says("web-3", map[string]deployments.UnitReport{"app": same}), says("web-4", map[string]deployments.UnitReport{"app": other}),
	}, noon)
	for name, c := range map[string]struct {
		f   *Fleet
		opt TableOptions
	}{
		"alike.txt":   {alike, TableOptions{Width: 80}},
		"pipe.txt":    {f, TableOptions{}},
		"80.txt":      {f, TableOptions{Width: 80}},
		"nodes.txt":   {f, TableOptions{Width: 100, AllNodes: true}},
		"color.txt":   {f, TableOptions{Width: 80, Color: true}},
		"halted.txt":  {rolling, TableOptions{Width: 80}},
		"nothing.txt": {Assemble(nil, noon), TableOptions{Width: 80}},
		"narrow.txt":  {f, TableOptions{Width: 60}},
	} {
		var out bytes.Buffer
		if err := WriteTable(&out, c.f, c.opt); err != nil {
			t.Fatal(err)
		}
		golden(t, name, out.Bytes())
		for line := range strings.Lines(out.String()) {
			if line = strings.TrimSuffix(line, "\n"); c.opt.Width > 0 && width(line) > c.opt.Width {
				t.Errorf("%s: a line of %d columns: %q", name, width(line), line)
			}
			if strings.TrimRight(line, " ") != line {
				t.Errorf("%s: a line ends in blanks: %q", name, line)
			}
			if !c.opt.Color && strings.ContainsRune(line, '\x1b') {
				t.Errorf("%s: colours that nobody asked for: %q", name, line)
			}
		}
	}
}

// At 80 columns what people type is whole, a unit's name and a node's, and of many units those that need attention can
// be shown alone.
func TestTableOfManyUnits(t *testing.T) {
	t.Parallel()
	role := deployments.RoleID{Stage: "prod-eu", Role: "checkout"}
	var all []kv.Entry
	for i := range deployments.MaxRoleUnits {
		id := role.Unit(fmt.Sprintf("app-%03d", i))
		record := deployments.Record{Target: release("app", "1.5.0"), Stable: release("app", "1.4.2"), Generation: 2}
		if i == 7 {
			record.Rollout = &deployments.Progress{Phase: deployments.PhasePendingApproval, Since: noon}
		}
		all = append(all, put(kv.DesiredKey(id), record))
	}
	node := strings.Repeat("n", 40)
	for _, name := range []string{node, "web-1"} {
		units := map[string]deployments.UnitReport{}
		for i := range deployments.MaxRoleUnits {
			units[fmt.Sprintf("app-%03d", i)] = runs("app", "1.5.0")
		}
		units["app-007"], units["app-011"] = runs("app", "1.4.2"), runs("app", "1.4.2")
		e := says(name, units)
		e.Key = kv.StatusKey(role.Stage, role.Role, name)
		all = append(all, e)
	}
	f := Assemble(all, noon)
	some, fine := f.Attention()
	var out bytes.Buffer
	if err := WriteTable(&out, some, TableOptions{Width: 80, LeftOut: fine}); err != nil {
		t.Fatal(err)
	}
	text := out.String()
	for _, want := range []string{"\nprod-eu/checkout/app-007 ", "\nprod-eu/checkout/app-011 ", "\n  " + node + "  "} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is missing", want)
		}
	}
	if strings.Contains(text, "app-050") || fine != deployments.MaxRoleUnits-2 || len(some.Units) != 2 ||
		!strings.Contains(text, fmt.Sprintf("and %d more, which need no attention\n", fine)) {
		t.Errorf("of %d units, %d are shown:\n%s", len(f.Units), len(some.Units), text)
	}
}

// The first line of a unit says which release runs where: a target that a canary alone runs, or that was rolled
// back, isn't taken for what the fleet runs.
func TestRowSaysWhatRuns(t *testing.T) {
	t.Parallel()
	unit := func(p *deployments.Progress, versions ...string) []kv.Entry {
		all := []kv.Entry{put(kv.DesiredKey(app), deployments.Record{Target: release("app", "2"), Stable: release("app", "1"), Generation: 2, Rollout: p})}
		for i, v := range versions {
			r := runs("app", v)
			if v == "" {
				r = deployments.UnitReport{State: deployments.StateWaiting}
			}
			all = append(all, says(fmt.Sprintf("web-%d", i), map[string]deployments.UnitReport{"app": r}))
		}
		return all
	}
	rebuilt := runs("app", "2")
	rebuilt.Running.Digest = release("app", "2 again").Digest
	for _, c := range []struct {
		entries []kv.Entry
		want    string
		tone    Tone
	}{
		{unit(nil), "-", Dim},
		{unit(nil, "2", "2"), "2 on 2", Good},
		{unit(&deployments.Progress{Phase: deployments.PhaseCanary}, "2", "1", "1"), "1 on 2, 2 on 1", Warn},
		{unit(&deployments.Progress{Phase: deployments.PhaseRolledBack, Failed: release("app", "2").Digest}, "1", "1"), "1 on 2", Warn},
		{unit(nil, "2", "", ""), "nothing on 2, 2 on 1", Warn},
		{unit(nil, "1", "2", "3", "4", "4"), "4 on 2, 1 on 1, 2 on 1, 1 more", Warn},
		{append(unit(nil, "2", "1"), gone(says("web-9", map[string]deployments.UnitReport{"app": runs("app", "1")}))), "1 on 1, 2 on 1", Warn},
		{append(unit(nil), says("web-9", map[string]deployments.UnitReport{"app": rebuilt})), "2 " + rebuilt.Running.Digest.Short()[:8] + " on 1", Warn},
		{append(unit(nil), says("web-9", nil)), "unknown on 1", Warn},
	} {
		f := Assemble(c.entries, noon)
		if got := f.Row(&f.Units[0])[runsColumn]; got.Text != c.want || got.Tone != c.tone {
			t.Errorf("%q, tone %d; want %q, tone %d", got.Text, got.Tone, c.want, c.tone)
		}
	}
}

// Nodes that no unit is meant for are shown: their stage or role may be mistyped. So are agents of several versions.
func TestTableOfStrayNodesAndVersions(t *testing.T) {
	t.Parallel()
	agent := func(role, node, version string) kv.Entry {
		e := put(kv.StatusKey("prod", role, node), deployments.Report{Node: node, Agent: version})
		e.Session = node
		return e
	}
	f := Assemble([]kv.Entry{
		put(kv.MirrorKey, deployments.MirrorState{Head: "4f2c91ab77d0"}), lease(),
		put(kv.DesiredKey(app), release("app", "1").String()),
		agent("web", "web-1", "1.5"), agent("web", "web-2", "1.5"), agent("wbe", "web-3", "1.4"), gone(agent("wbe", "web-4", "1.3")),
	}, noon)
	if want := []Unassigned{{"prod", "wbe", "web-3"}}; !slices.Equal(f.Unassigned, want) {
		t.Errorf("unassigned %v, want %v", f.Unassigned, want)
	}
	var out bytes.Buffer
	if err := WriteTable(&out, f, TableOptions{}); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"agents: 2 of 3 nodes run 1.5, 1 of 3 nodes run 1.4", "web-3  no unit is meant for prod/wbe"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q is missing in\n%s", want, &out)
		}
	}
	if all := (Filter{Stage: "prod", Role: "web"}).narrow(f).Unassigned; len(all) > 0 {
		t.Errorf("another role's: %v", all)
	}
}

// A pin that is over is told of, and nothing else goes by it.
func TestTableOfAPinThatIsOver(t *testing.T) {
	t.Parallel()
	f := Assemble([]kv.Entry{
		put(kv.DesiredKey(app), deployments.Record{Target: release("app", "2"), Stable: release("app", "1"), Generation: 2,
			Rollout: &deployments.Progress{Phase: deployments.PhasePaused, Message: "paused by an operator"}}),
		put(kv.PinKey(app), expired("hold")), put(kv.NodePinKey(app, "web-1"), expired("hold")),
		says("web-1", map[string]deployments.UnitReport{"app": runs("app", "1")}),
	}, noon)
	var out bytes.Buffer
	if err := WriteTable(&out, f, TableOptions{}); err != nil {
		t.Fatal(err)
	}
	if row := f.Row(&f.Units[0]); row[3].Text != "-" || strings.Count(out.String(), "which has ended") != 2 ||
		!strings.Contains(out.String(), "kedge resume prod/web/app") {
		t.Errorf("pin %q in\n%s", row[3].Text, &out)
	}
}

// One node of thousands that isn't converged shows, and one that is as well.
func TestBar(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		n, all int
		want   string
	}{
		{0, 0, "        "}, {0, 3, "░░░░░░░░"}, {1, 5000, "█░░░░░░░"}, {1, 2, "████░░░░"}, {4999, 5000, "███████░"}, {5000, 5000, "████████"},
	} {
		if got := bar(c.n, c.all); got != c.want {
			t.Errorf("%d of %d: %q, want %q", c.n, c.all, got, c.want)
		}
	}
}

// What others wrote must not reach the terminal as commands.
func TestTableIsClean(t *testing.T) {
	t.Parallel()
	evil := runs("app", "1\x1b[2J\x1b]0;owned\a")
	evil.State, evil.Error = deployments.StateRetrying, "no\r\n\x1b[31msuch\u202eobject"
	f := Assemble([]kv.Entry{
		put(kv.MirrorKey, deployments.MirrorState{Head: "\x1b[2Jabcdef0", Author: "\x1b[2J", Error: "\x1b[2J"}),
		put(kv.DesiredKey(app), deployments.Record{Target: release("app", "1"), Generation: 1}),
		put("pins/prod/web/app/web-1", "{release: hold, by: \"\\e[2J\", reason: \"\\e[2J\"}"),
		put("pins/prod/web/\x1b[2J", "hold"),
		says("web-1", map[string]deployments.UnitReport{"app": evil}),
	}, noon)
	var out bytes.Buffer
	if err := WriteTable(&out, f, TableOptions{AllNodes: true}); err != nil {
		t.Fatal(err)
	}
	if d, err := Explain(f, app, "web-1"); err != nil {
		t.Error(err)
	} else if err := WriteExplain(&out, f, app, "web-1", d, TableOptions{}); err != nil {
		t.Error(err)
	}
	if s := out.String(); strings.ContainsAny(s, "\x1b\a\r\u202e") {
		t.Errorf("%q", s)
	}
}

func TestExplain(t *testing.T) {
	t.Parallel()
	f := Assemble(busyFleet(), noon)
	for node, want := range map[string]policy.Source{"web-1": policy.FromTarget, "web-3": policy.FromTarget, "web-4": policy.FromNodePin, "web-9": policy.FromTarget} {
		d, err := Explain(f, app, node)
		if err != nil || d.Source != want || len(d.Trace) == 0 || d.Message == "" {
			t.Errorf("%s: %+v, %v; want it decided by the %s", node, d, err, want)
		}
	}
	worker := deployments.UnitID{Stage: "prod", Role: "web", Unit: "worker"}
	if d, err := Explain(f, worker, "web-2"); err != nil || d.Action != policy.ActKeep || d.Invalid == nil {
		t.Errorf("a record that does not parse: %+v, %v", d, err)
	}
	for _, c := range []struct{ unit, node, says string }{
		{"prod/web/nosuch", "web-1", "no unit prod/web/nosuch"},
		{"prod/web/app", "web-77", "there are web-1, web-2, web-3, web-4, web-9"},
		{"staging/web/app", "web-1", "no node of staging/web has ever reported"},
	} {
		id, _ := deployments.ParseUnitID(c.unit)
		if _, err := Explain(f, id, c.node); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("explain %s %s: %v, want %q", c.unit, c.node, err, c.says)
		}
	}
}

func TestFindUnitOfNode(t *testing.T) {
	t.Parallel()
	f := Assemble(busyFleet(), noon)
	if id, err := FindUnitOfNode(f, "web-1", "app"); err != nil || id != app {
		t.Errorf("%v, %v", id, err)
	}
	twice := *f
	twice.Units = append(slices.Clone(f.Units), Unit{ID: deployments.UnitID{Stage: "prod", Role: "api", Unit: "app"}, Nodes: []Node{{Name: "web-1"}}})
	for _, c := range []struct {
		f                *Fleet
		node, unit, says string
	}{
		{f, "web-1", "ap", "no unit ap on web-1: there are "},
		{f, "web-l", "app", "no node web-l has reported: did you mean web-"},
		{f, "database", "app", "no node database has reported: there are web-1, "},
		{&Fleet{}, "web-1", "app", "no other has"},
		{&twice, "web-1", "app", "want prod/web/app web-1 or prod/api/app web-1"},
	} {
		if _, err := FindUnitOfNode(c.f, c.node, c.unit); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s/%s: %v, want %q", c.node, c.unit, err, c.says)
		}
	}
}

// The decisions are written out here, so that how they look is tested apart from how they are made.
func TestExplainText(t *testing.T) {
	t.Parallel()
	f := Assemble(busyFleet(), noon)
	target := release("app", "1.4.2")
	none := []Step{{What: "node pin", Message: "none"}, {What: "unit pin", Message: "none"}}
	for name, c := range map[string]struct {
		node string
		d    Decision
		opt  TableOptions
	}{
		"explain-quarantine.txt": {"web-3", Decision{
			Decision: policy.Decision{Action: policy.ActRun, Target: target},
			Message:  "Git, commit 4f2c91a",
			Trace: append(slices.Clone(none),
				Step{What: "record", Message: target.String() + ", generation 2", Decides: true},
				Step{What: "quarantine", Message: "this release failed on this node before, and is not tried again",
					Hint: "push another release, or kedge retry prod/web/app"}),
		}, TableOptions{Width: 80}},
		"explain-hold.txt": {"web-2", Decision{
			Decision: policy.Decision{Action: policy.ActHold, Recheck: noon.Add(2 * time.Hour)},
			Message:  "hold: unit pin by alice (incident 812)",
			Trace:    []Step{none[0], {What: "unit pin", Message: "hold", Decides: true, Hint: "kedge unpin prod/web/app"}},
		}, TableOptions{Width: 80, Color: true}},
		"explain-invalid.txt": {"web-1", Decision{
			Decision: policy.Decision{Action: policy.ActKeep, Invalid: errors.New("the pin is neither a pointer nor hold")},
			Message:  "the node pin doesn't parse: nothing is changed",
			Trace:    []Step{{What: "node pin", Message: "doesn't parse", Decides: true}},
		}, TableOptions{}},
		"explain-pin.txt": {"web-4", Decision{
			Decision: policy.Decision{Action: policy.ActRun, Source: policy.FromNodePin, Target: release("app", "1.4.1")},
			Message:  "pinned, this node alone",
			Trace: []Step{{What: "node pin", Message: release("app", "1.4.1").String(), Decides: true,
				Hint: "kedge unpin prod/web/app --node web-4"}},
		}, TableOptions{Width: 80}},
		"explain-gone.txt": {"web-9", Decision{
			Decision: policy.Decision{Action: policy.ActRunAndStage, Target: release("app", "1.4.1"), Stage: target},
			Message:  "not admitted yet", Trace: none,
		}, TableOptions{Width: 80}},
	} {
		var out bytes.Buffer
		if err := WriteExplain(&out, f, app, c.node, c.d, c.opt); err != nil {
			t.Fatal(err)
		}
		golden(t, name, out.Bytes())
	}
}

func TestHistoryTable(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	err := WriteHistory(&out, []deployments.History{
		{Generation: 4, Release: release("app", "1.4.0"), Commit: "9d8e7f6a5b4c3d2e", Subject: "Back to 1.4.1", At: noon,
			Author: "Bob <bob@example.com>", Note: "pinned by ada: incident 2", Pinned: &deployments.Pinned{},
			Pins: []deployments.PastPin{{At: noon, Pin: deployments.Pin{
				Release: release("app", "1.4.0"), By: "ada", Reason: "incident 2"}}}},
		{Generation: 3, Release: release("app", "1.4.1"), Commit: "9d8e7f6a5b4c3d2e",
			Author: "Bob <bob@example.com>", Subject: "Back to 1.4.1, which worked, unlike the newer one that did not",
			At: noon, Note: "a change by hand was put back", Truncated: true,
			Pins: []deployments.PastPin{
				{At: noon.Add(time.Minute), Pin: deployments.Pin{
					Release: release("app", "1.4.0"), By: "ada", Reason: "incident 1", Until: noon.Add(time.Hour)},
					Ended: noon.Add(time.Hour)},
				{At: noon.Add(3 * time.Minute), Node: "web-1", Pin: deployments.Pin{Hold: true, AtOnce: true}},
				{At: noon.Add(4 * time.Minute), Node: "web-2", Error: "the pin is neither a pointer nor hold"},
			},
			Orders: []deployments.PastOrder{
				{At: noon.Add(2 * time.Minute), Order: deployments.Order{Verb: deployments.VerbPause, By: "bob"}},
				{At: noon.Add(5 * time.Minute), Order: deployments.Order{Verb: deployments.VerbPause, Reason: "to be sure"},
					Refused: deployments.ReasonPaused},
			}},
		{Generation: 2, Release: release("app", "1.4.2"), Commit: "4f2c91ab77d0c0ff", Author: "Alice <alice@example.com>", Subject: "1.4.2", At: noon.Add(-26 * time.Hour)},
		{Generation: 1, Note: "does not parse: unexpected end of JSON input"},
	}, TableOptions{Width: 100})
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "history.txt", out.Bytes())
}

// A store that no mirror has written to is shown with the next step, and no other store is.
func TestTableBeforeAnyMirror(t *testing.T) {
	t.Parallel()
	const step = "start a mirror of the deployments repo"
	for _, c := range []struct {
		name  string
		fleet *Fleet
		says  bool
	}{
		{"nothing", Assemble(nil, noon), true},
		{"a mirror that runs", Assemble([]kv.Entry{lease()}, noon), false},
		{"a mirror that ran", Assemble([]kv.Entry{put(kv.MirrorKey, deployments.MirrorState{Head: "4f2c91a"})}, noon), false},
		{"mirror/ unread", withErrors(Assemble(nil, noon), map[string]error{kv.MirrorPrefix: kv.ErrDenied}), false},
	} {
		var table strings.Builder
		if err := WriteTable(&table, c.fleet, TableOptions{Width: 80}); err != nil {
			t.Fatal(err)
		}
		if got := strings.Contains(strings.Join(strings.Fields(table.String()), " "), step); got != c.says {
			t.Errorf("%s: %t\n%s", c.name, got, table.String())
		}
		unknown := c.fleet.Errors[kv.MirrorPrefix] != ""
		if strings.Contains(table.String(), "taken no commit") == (unknown || c.fleet.Mirror != nil) {
			t.Errorf("%s:\n%s", c.name, table.String())
		}
	}
}
