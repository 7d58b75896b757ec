package main

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"kedge/deployments"
	"kedge/kv"
)

// Pins and orders stand in kedge history with who and why, and with their ends: of units without a rollout, of single
// nodes, by kedge and by the consul program, and over a change of mirrors.
func TestPinsAndOrdersStandInTheHistory(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	m := w.startMirror("mirror-1")
	// No node runs any of it: what is pinned where is the mirror's business.
	p := deployments.Pointer{URL: "s3://acme-releases/app/1/manifest.yaml", Digest: deployments.Digest{1}}
	plain := "release: " + p.String() + "\n"
	paced := plain + "rollout:\n  max_unavailable: 1\n"
	base := deployments.UnitID{Stage: "prod", Role: "web", Unit: "base"}
	w.push("two units", map[string]*string{webApp.String(): &plain, base.String(): &paced})
	for _, id := range []deployments.UnitID{webApp, base} {
		w.eventually("the record of "+id.String(), func() error {
			_, err := w.store.Get(t.Context(), kv.DesiredKey(id))
			return err
		})
	}

	do := func(args ...string) string {
		t.Helper()
		out, text, code := w.kedge(args...)
		if code != exitDone {
			t.Fatalf("kedge %v: %d: %s", args, code, text)
		}
		return out
	}
	// past returns the pins and orders that the history tells of: * stands for a pin that goes on.
	past := func(id deployments.UnitID) (all []string) {
		t.Helper()
		var history []deployments.History
		if err := json.Unmarshal([]byte(do("history", id.String(), "--json")), &history); err != nil {
			t.Fatal(err)
		}
		for _, h := range slices.Backward(history) {
			for _, pin := range h.Pins {
				what := strings.TrimSpace(fmt.Sprintf("%s %s %s", pin.Node, pin.By, pin.Reason))
				if pin.Ended.IsZero() {
					what += "*"
				}
				all = append(all, what)
			}
			for _, o := range h.Orders {
				all = append(all, strings.TrimSpace(fmt.Sprintf("%s %s %s", o.Verb, o.By, o.Order.Reason)))
			}
		}
		return all
	}
	told := func(id deployments.UnitID, want ...string) {
		t.Helper()
		w.eventually("the history of "+id.String(), func() error {
			if got := past(id); !slices.Equal(got, want) {
				return fmt.Errorf("it has %q, want %q", got, want)
			}
			return nil
		})
	}

	do("pin", "prod/web/app", "hold", "--node", "web-1", "--by", "bob", "--reason", "disk")
	told(webApp, "web-1 bob disk*")
	do("pin", "prod/web/app", p.String(), "--by", "ada", "--reason", "incident 1", "--until", "1h")
	told(webApp, "web-1 bob disk*", "ada incident 1*")
	if err := m.stop(); err != nil {
		t.Error(err)
	}
	do("unpin", "prod/web/app", "--node", "web-1")
	w.startMirror("mirror-2")
	told(webApp, "web-1 bob disk", "ada incident 1*")
	for within := 3 * time.Second; len(past(webApp)) < 3; within *= 2 { // the mirror has to see it before it ends
		do("pin", "prod/web/app", p.String(), "--by", "ada", "--reason", "incident 2", "--until", within.String())
		for end := time.Now().Add(within); len(past(webApp)) < 3 && time.Now().Before(end); {
			time.Sleep(50 * time.Millisecond)
		}
	}
	told(webApp, "web-1 bob disk", "ada incident 1", "ada incident 2")
	w.consul.CLI(w.token("operator", deployments.RuleVars{}), "", "kv", "put", "kedge/"+kv.PinKey(webApp), "hold")
	told(webApp, "web-1 bob disk", "ada incident 1", "ada incident 2", "*")
	if text := do("history", "prod/web/app"); !strings.Contains(
		text, ": pin of all nodes: hold, nobody said who or why") ||
		!strings.Contains(text, "incident 2), until ") {
		t.Errorf("for people it says\n%s", text)
	}

	// An order that changes nothing else is one more line of the generation that is there.
	do("pause", "prod/web/base", "--by", "ada", "--reason", "errors rise")
	told(base, "pause ada errors rise")
	w.consul.CLI(w.token("operator", deployments.RuleVars{}), "", "kv", "put", "kedge/"+kv.ControlKey(base), "resume")
	told(base, "pause ada errors rise", "resume")
}
