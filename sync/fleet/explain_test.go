package fleet

import (
	"bytes"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"kedge/deployments"
	"kedge/kv"
	"kedge/policy"
)

// Each state that an operator may ask about, from the store's entries to the screen: three nodes, of which web-1 is
// looked at.
func TestExplainStates(t *testing.T) {
	t.Parallel()
	v1, v2, v3 := release("app", "1"), release("app", "2"), release("app", "3")
	const commit = "4f2c91ab77d0c0ffee00c0ffee00c0ffee00c0ff"
	type record = deployments.Record
	type progress = deployments.Progress
	type report = deployments.UnitReport
	git := put(kv.MirrorKey, deployments.MirrorState{Holder: "mirror-1", Head: commit, Author: "Alice <alice@example.com>", At: noon.Add(-4 * time.Minute)})
	desired := func(r record) kv.Entry {
		r.Target, r.Generation, r.Commit = v2, 2, commit
		return put(kv.DesiredKey(app), r)
	}
	rollout := func(p progress) kv.Entry { return desired(record{Stable: v1, Rollout: &p}) }
	// canary is a node before web-1 in line, last one behind it.
	rank := func(node string) uint64 { return policy.Rank(node, v2.Digest) }
	canary, last := "", ""
	for i := 2; canary == "" || last == ""; i++ {
		if n := fmt.Sprint("web-", i); rank(n) < rank("web-1") {
			canary = n
		} else {
			last = n
		}
	}
	first, all := rank(canary), rank(last)
	on := func(p deployments.Pointer, change ...func(*report)) report {
		r := report{State: deployments.StateConverged, Running: p, Want: p, Generation: 2, Since: noon.Add(-time.Minute)}
		for _, f := range change {
			f(&r)
		}
		return r
	}
	is := func(state deployments.State, want deployments.Pointer, trouble string) func(*report) {
		return func(r *report) { r.State, r.Want, r.Error = state, want, trouble }
	}
	because := func(reason deployments.Reason) func(*report) { return func(r *report) { r.Reason = reason } }
	failed := func(r *report) { r.Quarantined = []deployments.Digest{v2.Digest} }
	pinned := func(r *report) { r.Pinned = true }
	logged := func(r *report) {
		r.Errors = []deployments.LoggedError{
			{At: noon.Add(-time.Minute), Text: "the live release is unhealthy: /ready answers 503, and the release " +
				"stays live: http 127.0.0.1:8080: 503"},
			{At: noon.Add(-time.Hour), Text: "the deployment failed: post: exit status 1"},
		}
	}
	xmas := deployments.Facts{"window": "xmas", "until": "2026-12-27T08:00:00Z", "reason": "nobody is here"}
	waiting := progress{Phase: deployments.PhasePendingApproval, Cutoff: first, HealthySince: noon,
		Message: "the canaries are healthy: waits for promote"}
	for name, c := range map[string]struct {
		node    report
		entries []kv.Entry
		// says is the step that has to decide, or to be in the way, and for what is to be changed the words to type.
		decides, blocks, type_ string
	}{
		"converged":      {on(v2), []kv.Entry{desired(record{})}, "admission", "", ""},
		"canary":         {on(v1, func(r *report) { r.Staged = v2.Digest }), []kv.Entry{rollout(progress{Phase: deployments.PhaseCanary, Cutoff: first, Message: "1 of 1 canary admitted"})}, "admission", "", "kedge pin prod/web/app " + v2.String() + " --node web-1"},
		"baking":         {on(v1), []kv.Entry{rollout(progress{Phase: deployments.PhaseCanary, Cutoff: first, HealthySince: noon, Message: "the canaries bake until 2026-11-24 12:05:00Z"})}, "admission", "", "kedge promote prod/web/app"},
		"approval":       {on(v1), []kv.Entry{rollout(waiting)}, "admission", "", "kedge promote prod/web/app"},
		"frozen":         {on(v1), []kv.Entry{rollout(progress{Phase: deployments.PhaseFrozen, Reason: deployments.ReasonFrozen, Facts: xmas})}, "admission", "", "kedge promote prod/web/app"},
		"slot":           {on(v1), []kv.Entry{rollout(progress{Phase: deployments.PhaseRolling, Cutoff: first, Message: "1 of 3 nodes admitted"})}, "admission", "", ""},
		"paused":         {on(v1), []kv.Entry{rollout(progress{Phase: deployments.PhasePaused, Cutoff: first, Message: "paused by an operator"})}, "admission", "", "kedge resume prod/web/app"},
		"going-back":     {on(v2), []kv.Entry{rollout(progress{Phase: deployments.PhaseRollingBack, Cutoff: all, Message: "aborted by an operator"})}, "admission", "", ""},
		"halted":         {on(v1, failed), []kv.Entry{rollout(progress{Phase: deployments.PhaseRolledBack, Failed: v2.Digest, Message: "rolled back: 1 of 3 nodes failed (web-1: health), at most 0 may"})}, "admission", "", "kedge retry prod/web/app"},
		"replaced":       {on(v2), []kv.Entry{put(kv.DesiredKey(app), record{Target: v3, Stable: v1, Generation: 2, Commit: commit, Rollout: &progress{Phase: deployments.PhaseCanary, Message: "0 of 1 canary admitted", Superseded: []deployments.Superseded{{Digest: v2.Digest, Cutoff: all, Generation: 1}}}})}, "admission", "", ""},
		"stable-failed":  {on(v2, is(deployments.StateQuarantined, v1, "release 172d failed in health, went back: 503"), func(r *report) { r.Quarantined = []deployments.Digest{v1.Digest} }), []kv.Entry{rollout(progress{Phase: deployments.PhaseRolledBack, Failed: v2.Digest, Message: "aborted by an operator"})}, "admission", "quarantine", "kedge retry prod/web/app"},
		"first":          {report{State: deployments.StateWaiting, Generation: 2}, []kv.Entry{desired(record{Rollout: &progress{Phase: deployments.PhaseFrozen, Reason: deployments.ReasonFrozen, Facts: deployments.Facts{"window": "xmas"}}})}, "admission", "", ""},
		"quarantined":    {on(v1, failed, is(deployments.StateQuarantined, v2, "release 5ce4 failed in post, went back: exit status 1")), []kv.Entry{desired(record{Stable: v1})}, "admission", "quarantine", "kedge retry prod/web/app"},
		"node-pin":       {on(v1, pinned), []kv.Entry{desired(record{}), put(kv.NodePinKey(app, "web-1"), v1.String()), put(kv.PinKey(app), v3.String())}, "node pin", "", "kedge unpin prod/web/app --node web-1"},
		"unit-pin":       {on(v1, pinned), []kv.Entry{desired(record{}), put(kv.PinKey(app), "{release: "+v1.String()+", by: alice, reason: incident 812, until: 2026-11-24T14:00:00Z}")}, "unit pin", "", "kedge unpin prod/web/app"},
		"pin-failed":     {on(v1, pinned, failed), []kv.Entry{desired(record{}), put(kv.PinKey(app), v1.String())}, "unit pin", "", "before you unpin"},
		"pin-ended":      {on(v2), []kv.Entry{desired(record{}), put(kv.PinKey(app), "{release: "+v1.String()+", by: alice, until: 2026-11-24T11:00:00Z}")}, "admission", "", ""},
		"held":           {on(v1, pinned, is(deployments.StateHeld, deployments.Pointer{}, "")), []kv.Entry{rollout(waiting), put(kv.PinKey(app), "{release: hold, by: alice}")}, "unit pin", "", "kedge unpin prod/web/app"},
		"pin-bad":        {on(v1, pinned, is(deployments.StateInvalid, deployments.Pointer{}, `node pin: the pin is neither a pointer nor hold: pointer "hodl" does not end in @sha256:HEX: a URL alone could change under the nodes`)), []kv.Entry{desired(record{}), put(kv.NodePinKey(app, "web-1"), "hodl")}, "node pin", "", "kedge unpin prod/web/app --node web-1"},
		"pin-bad-below":  {on(v1, pinned), []kv.Entry{desired(record{}), put(kv.NodePinKey(app, "web-1"), v1.String()), put(kv.PinKey(app), "hodl")}, "node pin", "", ""},
		"record-bad":     {on(v1, is(deployments.StateInvalid, deployments.Pointer{}, `record: the record: field "target" can't be a number`)), []kv.Entry{put(kv.DesiredKey(app), `{"target": 12}`)}, "record", "", ""},
		"record-none":    {on(v1, is(deployments.StateWaiting, deployments.Pointer{}, "")), nil, "record", "", "add prod/web/app.yaml"},
		"record-by-hand": {on(v2, func(r *report) { r.Generation = 0 }), []kv.Entry{put(kv.DesiredKey(app), v2.String()+"\n")}, "admission", "", ""},
		"bounds":         {on(v1, is(deployments.StateInvalid, deployments.Pointer{}, v2.URL+" is not from s3://other, which is all that this node's configuration allows")), []kv.Entry{desired(record{})}, "admission", "node", ""},
		"unhealthy": {on(v2, is(deployments.StateUnhealthy, v2, "http 127.0.0.1:8080: 503"), logged),
			[]kv.Entry{desired(record{})}, "admission", "node", ""},
		"unsigned": {on(v1, is(deployments.StateRetrying, v2,
			"release "+v2.String()+": "+v2.URL+" was published by nobody whom this node knows"),
			because(deployments.ReasonUnsigned)), []kv.Entry{desired(record{})},
			"admission", "signature", "kedge publish --sign"},
		"retrying": {on(v1, is(deployments.StateRetrying, v2, "503 Slow Down")), []kv.Entry{desired(record{})},
			"admission", "node", ""},
		"fetching": {on(v1, is(deployments.StateFetching, v2, "")), []kv.Entry{desired(record{})}, "admission", "", ""},
		"behind": {on(v1, func(r *report) { r.Generation = 1 }), []kv.Entry{desired(record{})}, "admission",
			"node", ""},
		"silent": {report{}, []kv.Entry{desired(record{})}, "admission", "node", ""},
		"frozen-midway": {on(v1), []kv.Entry{rollout(progress{Phase: deployments.PhaseRolling, Cutoff: first,
			Promoted: true, Reason: deployments.ReasonFrozen, Facts: xmas})}, "admission", "", "kedge promote prod/web/app"},
		"removed": {on(v1), []kv.Entry{desired(policy.MarkOrphaned(record{Stable: v1,
			Rollout: &progress{Phase: deployments.PhaseRolling, Cutoff: first, Promoted: true,
				Message: "1 of 3 nodes admitted"}}))}, "admission", "", "put prod/web/app.yaml back"},
		"order": {on(v1), []kv.Entry{rollout(waiting), put(kv.ControlKey(app), "promote")}, "admission", "", ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			units := map[string]report{"app": c.node}
			if c.node.State == "" {
				units = nil
			}
			entries := append(slices.Clone(c.entries), git, lease(), says("web-1", units),
				says(canary, map[string]report{"app": on(v1)}), says(last, map[string]report{"app": on(v1)}))
			explained(t, "explain-"+name+".txt", Assemble(entries, noon), c.decides, c.blocks, c.type_)
		})
	}

	lost := Assemble([]kv.Entry{git, lease(), desired(record{}), gone(says("web-1", map[string]report{"app": on(v1)}))}, noon)
	explained(t, "explain-lost.txt", lost, "admission", "node", "")
	idle := Assemble([]kv.Entry{git, desired(record{}), says("web-1", map[string]report{"app": on(v2)})}, noon)
	explained(t, "explain-no-mirror.txt", idle, "admission", "Git", "")
	refused := put(kv.MirrorKey, deployments.MirrorState{Head: commit, Refused: "9d8e7f6a5b4c3d2e1f00c0ffee00c0ffee00c0ff", Error: "prod/web/app.yaml:2:1: unknown field \"relaese\""})
	explained(t, "explain-refused.txt", Assemble([]kv.Entry{refused, lease(), desired(record{}), says("web-1", map[string]report{"app": on(v2)})}, noon), "admission", "Git", "kedge check")
	away := Assemble([]kv.Entry{git, lease(), desired(record{}), says("web-1", map[string]report{"app": on(v2)})}, noon)
	for _, kind := range kinds {
		away.Errors[kind] = "list " + kind + `: the store is unavailable: Get "http://127.0.0.1:8500/v1/kv/kedge/` + kind + `": connection refused`
	}
	explained(t, "explain-store-away.txt", away, "admission", "store", "")
}

func explained(t *testing.T, file string, f *Fleet, decides, blocks, words string) {
	t.Helper()
	d, err := Explain(f, app, "web-1")
	if err != nil {
		t.Fatal(err)
	}
	deciding, blocking, unblock := []string{}, []string{}, ""
	for _, s := range d.Trace {
		if s.Decides {
			deciding = append(deciding, s.What)
		}
		if s.Blocks {
			blocking = append(blocking, s.What)
		}
		unblock += s.Hint + "\n"
	}
	if !slices.Equal(deciding, []string{decides}) || blocks == "" && len(blocking) > 0 || blocks != "" && !slices.Contains(blocking, blocks) || !strings.Contains(unblock, words) {
		t.Errorf("%s: %v decides, %v is in the way, want %s, %s and %q to type:\n%s", file, deciding, blocking, decides, blocks, words, unblock)
	}
	writeExplained(t, f, d, file)
}

// writeExplained holds what is shown of web-1 to a golden file, and its JSON to its form.
func writeExplained(t *testing.T, f *Fleet, d Decision, file string) {
	t.Helper()
	var out bytes.Buffer
	if err := WriteExplain(&out, f, app, "web-1", d, TableOptions{Width: 80}); err != nil {
		t.Fatal(err)
	}
	golden(t, file, out.Bytes())
	for line := range strings.Lines(out.String()) {
		// Only a command to type may be longer: it is to be copied.
		if line = strings.TrimSuffix(line, "\n"); width(line) > 80 && !strings.Contains(line, "kedge ") || strings.Contains(line, unbroken) || strings.TrimRight(line, " ") != line {
			t.Errorf("%s: a line of %d columns: %q", file, width(line), line)
		}
	}
	explanation, err := ExplanationOf(f, app, "web-1", d)
	if err != nil {
		t.Fatal(err)
	}
	data, err := json.Marshal(explanation)
	if err != nil || !strings.HasPrefix(string(data), `{"unit":"prod/web/app","node":"web-1","action":"`) || !strings.Contains(string(data), `"decides":true`) {
		t.Errorf("%s: %s, %v", file, data, err)
	}
}

// What a node's own agent knows is explained without the store: here it is away, and the agent goes by what it last
// knew.
func TestExplainLocal(t *testing.T) {
	t.Parallel()
	v1, v2 := release("app", "1"), release("app", "2")
	s := policy.NodeStatus{
		Node: "web-1", Stage: "prod",
		Sources: []policy.SourceStatus{
			{Prefix: "desired/prod/web/", From: "last known state", Since: noon.Add(-2 * time.Hour),
				Error: "list desired/prod/web/: no leader", ErrorSince: noon.Add(-30 * time.Minute)},
			{Prefix: "pins/prod/web/", From: "store", Since: noon},
			{Prefix: "desired/prod/api/", From: "store", Since: noon},
		},
		Roles: map[string]deployments.Report{
			"web": {Units: map[string]deployments.UnitReport{"app": {
				State: deployments.StateWaiting, Running: v1, Want: v2, Version: "1", Message: "waits for base",
				Reason:     deployments.ReasonDependency,
				Facts:      deployments.Facts{"unit": "base", "error": "waits for base"},
				Generation: 2, Since: noon.Add(-time.Minute),
			}}},
			"api": {Units: map[string]deployments.UnitReport{"db": {}}},
		},
		Decisions: map[string]policy.DecisionStatus{"web/app": {Action: policy.ActRun, Target: v2,
			Source: policy.FromTarget, Message: "Git commit 4f2c91a", WaitsFor: "waits for base",
			Trace: []Step{{What: "node pin", Message: "none"}, {What: "record", Message: v2.String(), Decides: true}}}},
	}
	for _, name := range []string{"app", "web/app"} {
		f, id, d, err := Local(s, name, noon)
		if err != nil || id != app {
			t.Fatalf("%s: %v, %v", name, id, err)
		}
		writeExplained(t, f, d, "explain-local.txt")
	}
	for state, c := range map[deployments.State]struct {
		action policy.Action
		reason deployments.Reason
		want   bool
	}{
		deployments.StateHeld:      {policy.ActHold, "", true},
		deployments.StateWaiting:   {policy.ActKeep, "", true},
		deployments.StateFetching:  {policy.ActRun, "", false},
		deployments.StateConverged: {policy.ActRun, deployments.ReasonOldGeneration, false},
	} {
		units := map[string]deployments.UnitReport{"app": {State: state, Reason: c.reason, Running: v1}}
		own := policy.NodeStatus{Stage: "prod", Roles: map[string]deployments.Report{"web": {Units: units}},
			Decisions: map[string]policy.DecisionStatus{"web/app": {Action: c.action, Target: v1}}}
		if f, _, _, err := Local(own, "app", noon); err != nil || f.Units[0].Nodes[0].Converged != c.want {
			t.Errorf("%s: converged is %t, %v", state, !c.want, err)
		}
	}
	for name, says := range map[string]string{"ap": "no unit ap on this node: there are api/db, web/app", "prod/web/app": "no unit"} {
		if _, _, _, err := Local(s, name, noon); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v, want %q", name, err, says)
		}
	}
	s.Roles["api"].Units["app"] = deployments.UnitReport{}
	_, _, _, err := Local(s, "app", noon)
	if err == nil || !strings.Contains(err.Error(), "want one of api/app, web/app") {
		t.Errorf("two of that name: %v", err)
	}
	if _, _, _, err := Local(policy.NodeStatus{}, "app", noon); err == nil || !strings.Contains(err.Error(), "it has none yet") {
		t.Errorf("none at all: %v", err)
	}
}

// A node that only observes has no place in the line: the mirror admits it to nothing.
func TestPlaceLeavesOutObservers(t *testing.T) {
	t.Parallel()
	held := deployments.UnitReport{State: deployments.StateHeld}
	u := &Unit{Record: &deployments.Record{Target: release("app", "2"),
		Rollout: &deployments.Progress{Phase: deployments.PhaseRolling}}}
	u.Nodes = []Node{{Name: "web-1"}, {Name: "web-2", Report: held}, {Name: "web-3", Report: held}}
	if got := placeInRollout(u, &u.Nodes[0]); got != "1st in line of 1 live node, 0 admitted" {
		t.Errorf("a node beside observers: %q", got)
	}
	if got := placeInRollout(u, &u.Nodes[1]); got != "" {
		t.Errorf("an observer: %q", got)
	}
}

func TestOrdinal(t *testing.T) {
	t.Parallel()
	for n, want := range map[int]string{1: "1st", 2: "2nd", 3: "3rd", 4: "4th", 11: "11th", 12: "12th", 13: "13th", 21: "21st", 112: "112th"} {
		if got := ordinal(n); got != want {
			t.Errorf("%d: %s", n, got)
		}
	}
}

// A command to type is never broken between its words, and a text is.
func TestWrapKeepsCommandsWhole(t *testing.T) {
	t.Parallel()
	got := Wrap("kedge: one two three four\n  wait for its turn, or type: kedge pin prod/web/app hold --node web-1, then look", 30)
	want := "kedge: one two three four\n  wait for its turn, or type:\n    kedge pin prod/web/app hold --node web-1,\n    then look"
	if got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	got = Wrap("its rules are those of kedge acl web. It asks nobody who they are", 30) // a sentence ends a command
	if want := "its rules are those of\n  kedge acl web. It asks\n  nobody who they are"; got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}
