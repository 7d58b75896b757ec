package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"kedge/deployments"
	"kedge/kv"
	"kedge/sync/agent/statedir"
)

// rolledBack waits until the app's rollout has been rolled back.
func (s *service) rolledBack(p deployments.Pointer) deployments.Record {
	s.t.Helper()
	return s.record(p.URL+" is rolled back", func(r deployments.Record) string {
		if r.Rollout == nil || r.Rollout.Phase != deployments.PhaseRolledBack || r.Rollout.Failed != p.Digest {
			return "it is not"
		}
		return ""
	})
}

// tries is how often a version has begun, on all nodes together.
func (s *service) tries(version string) (n int) {
	s.t.Helper()
	for _, line := range s.lines() {
		if strings.HasPrefix(line, "begin ") && strings.HasSuffix(line, " "+version) {
			n++
		}
	}
	return n
}

// inPhase waits until the rollout of a release is in a phase.
func (s *service) inPhase(p deployments.Pointer, phase deployments.Phase) {
	s.t.Helper()
	s.record(fmt.Sprintf("the rollout of %s is %s", p.URL, phase), func(r deployments.Record) string {
		if r.Target != p || r.Rollout == nil || r.Rollout.Phase != phase {
			return "it is not"
		}
		return ""
	})
}

// answers waits until a node's agent answers a question with a status.
func (s *service) answers(node, question string, status int) {
	s.t.Helper()
	socket := statedir.SocketPath(filepath.Join(s.dir, node, "state"))
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: dial}}
	s.eventually(fmt.Sprintf("%s of %s is %d", question, node, status), func() error {
		resp, err := client.Get("http://agent" + question)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if text, _ := io.ReadAll(resp.Body); resp.StatusCode != status {
			return fmt.Errorf("%s: %s", resp.Status, text)
		}
		return nil
	})
}

// A canary whose checks begin to fail while it bakes takes the release back. A release that is live on all nodes, and
// fails later, stays there: the node isn't ready, says so, and is ready once its checks pass again.
func TestChecksThatFailLater(t *testing.T) {
	t.Parallel()
	s := newService(t, "web-1", "web-2", "web-3")
	zero := s.first("max_unavailable: 1")
	one := s.version("1", ":")
	s.deploy(one, "canary: 1, bake: 30s, max_failures: 0, max_unavailable: 1")
	canary := s.begun("1")
	s.reported(canary, "app", func(u deployments.UnitReport) string {
		if u.Running != one || u.State != deployments.StateConverged {
			return "it doesn't bake"
		}
		return ""
	})
	s.sick("1", canary)
	if r := s.rolledBack(one); r.Stable != zero {
		t.Errorf("stable is %s", r.Stable)
	}
	s.live("app", "0", s.nodes...)
	if n := s.tries("1"); n != 1 {
		t.Errorf("%d nodes tried it, want the canary alone:\n%s", n, strings.Join(s.lines(), "\n"))
	}

	two := s.version("2", ":")
	s.deploy(two, "max_unavailable: 1")
	s.stable(two)
	s.answers("web-1", "/ready", http.StatusOK)
	s.sick("2", "web-1")
	s.answers("web-1", "/ready", http.StatusServiceUnavailable)
	s.answers("web-1", "/converged", http.StatusServiceUnavailable)
	s.reported("web-1", "app", func(u deployments.UnitReport) string {
		if u.State != deployments.StateUnhealthy || !strings.Contains(u.Error, "sick-2") {
			return "it doesn't say which check fails"
		}
		return ""
	})
	s.answers("web-2", "/ready", http.StatusOK)
	if err := os.Remove(filepath.Join(s.srv("web-1"), "sick-2")); err != nil {
		t.Fatal(err)
	}
	s.answers("web-1", "/ready", http.StatusOK)
	s.stable(two)
	s.keeps(1)
}

// Pins, their ends by hand and by themselves, and rollbacks go by the budget. Their success ends no quarantine: what
// had failed stays out when the pin is gone.
func TestPinsKeepTheBudgetAndTheQuarantine(t *testing.T) {
	t.Parallel()
	s := newService(t, "web-1", "web-2", "web-3", "web-4")
	do := func(args ...string) {
		t.Helper()
		if _, text, code := s.kedge(args...); code != exitDone {
			t.Fatalf("kedge %v: %d: %s", args, code, text)
		}
	}
	const rollout = "max_unavailable: 1"
	zero := s.first(rollout)
	one, two := s.version("1", "sleep 0.3"), s.version("2", "exit 1")
	s.deploy(one, rollout)
	s.stable(one)
	do("rollback", "prod/web/app")
	s.live("app", "0", s.nodes...)
	s.stable(zero)
	do("unpin", "prod/web/app")
	s.stable(one)
	s.live("app", "1", s.nodes...)
	do("pin", "prod/web/app", zero.String(), "--reason", "incident", "--until", "1h")
	s.stable(zero)
	do("pin", "prod/web/app", zero.String(), "--reason", "incident", "--until", "2s") // the same, and its end
	s.stable(one)
	s.live("app", "1", s.nodes...)
	s.keeps(1)
	text, _, _ := s.kedge("history", "prod/web/app", "--json")
	if strings.Count(text, "the pin ended") != 2 || !strings.Contains(text, ": incident") {
		t.Errorf("the history doesn't say who pinned and why, and that both pins ended:\n%s", text)
	}

	s.deploy(two, rollout+", max_failures: 0")
	s.rolledBack(two)
	says := func(words string, args ...string) error {
		out, text, code := s.kedge(args...)
		if code != exitDone || !strings.Contains(strings.Join(strings.Fields(out+text), " "), words) {
			return fmt.Errorf("kedge %v doesn't say %q: %d:\n%s%s", args, words, code, out, text)
		}
		return nil
	}
	s.live("app", "1", s.nodes...)
	s.eventually("status tells what runs", func() error { // once the nodes have reported
		return says("prod/web/app 2 1 on 4 - 4/4 rolled-back", "status", "prod/web/app")
	})
	if err := says("all 4 live nodes run it already, as 2 ", "rollback", "prod/web/app"); err != nil {
		t.Error(err)
	}
	do("pin", "prod/web/app", zero.String(), "--reason", "incident")
	s.stable(zero)
	// The mirror may have begun to go back by the time at which unpin reads the record.
	back := regexp.MustCompile(`, which (was|is being) rolled back: nodes go to 1 `)
	if out, text, code := s.kedge("unpin", "prod/web/app"); code != exitDone ||
		!back.MatchString(strings.Join(strings.Fields(out+text), " ")) {
		t.Errorf("kedge unpin doesn't say %s: %d:\n%s%s", back, code, out, text)
	}
	s.rolledBack(two)
	s.live("app", "1", s.nodes...)
	if n := s.tries("2"); n != 1 {
		t.Errorf("%d tries of what had failed:\n%s", n, strings.Join(s.lines(), "\n"))
	}
	s.keeps(1)

	// Without a rollout it fails on all: they stay on what the pin brought, as there is nothing else that is good.
	three := s.version("3", "exit 1")
	s.release("to all at once", three)
	failed := func() {
		t.Helper()
		for _, node := range s.nodes {
			s.reported(node, "app", func(u deployments.UnitReport) string {
				if u.State != deployments.StateQuarantined || u.Want != three {
					return "it has not failed"
				}
				return ""
			})
		}
	}
	failed()
	do("pin", "prod/web/app", zero.String(), "--reason", "incident")
	s.live("app", "0", s.nodes...)
	do("unpin", "prod/web/app")
	failed()
	if n := s.tries("3"); n != len(s.nodes) {
		t.Errorf("%d tries of what had failed on all:\n%s", n, strings.Join(s.lines(), "\n"))
	}
}

// All that kedge keeps in Consul is deleted in each phase of a rollout: it goes on, or begins anew by its gates, never
// with more nodes than the budget allows; what had failed stays out, and the next release goes its way.
func TestConsulEmptiedInEachPhase(t *testing.T) {
	t.Parallel()
	s := newService(t, "web-1", "web-2", "web-3")
	empty := func() {
		s.consul.CLI(s.consul.RootToken, "", "kv", "delete", "-recurse", "kedge/")
		s.eventually("records are made again", func() error {
			_, err := s.store.Get(t.Context(), kv.DesiredKey(webApp))
			return err
		})
	}
	const budget = "max_unavailable: 1"
	s.first(budget)

	one := s.version("1", "sleep 0.5")
	s.deploy(one, "canary: 1, "+budget)
	s.begun("1")
	empty()
	s.stable(one)

	two := s.version("2", ":")
	s.deploy(two, "canary: 1, bake: 10s, "+budget) // as long as it takes to empty Consul on a busy machine
	canary := s.begun("2")
	s.live("app", "2", canary)
	empty()
	if n := s.tries("2"); n != 1 {
		t.Errorf("%d nodes run what bakes:\n%s", n, strings.Join(s.lines(), "\n"))
	}
	s.stable(two)

	three := s.version("3", "sleep 0.5")
	s.deploy(three, budget)
	s.inPhase(three, deployments.PhaseRolling)
	s.live("app", "3", s.begun("3"))
	empty()
	s.stable(three)

	four := s.version("4", ":")
	s.deploy(four, "canary: 1, approval: manual, "+budget)
	s.inPhase(four, deployments.PhasePendingApproval)
	empty()
	s.inPhase(four, deployments.PhasePendingApproval)
	if n := s.tries("4"); n != 1 {
		t.Errorf("%d switches, want one of release 4:\n%s", n, strings.Join(s.lines(), "\n"))
	}
	if _, text, code := s.kedge("promote", "prod/web/app"); code != exitDone {
		t.Fatalf("kedge promote: %s", text)
	}
	s.stable(four)

	five := s.version("5", "exit 1")
	s.deploy(five, "canary: 1, "+budget)
	s.rolledBack(five)
	empty()
	s.rolledBack(five)
	s.live("app", "4", s.nodes...)
	if n := s.tries("5"); n != 1 {
		t.Errorf("%d switches, want release 5 on its canary alone:\n%s", n, strings.Join(s.lines(), "\n"))
	}
	six := s.version("6", ":")
	s.deploy(six, "canary: 1, "+budget)
	s.stable(six)
	s.keeps(1)
}

// A release that hung on all nodes went out without a rollout; the fix comes with one, and is held up by nobody.
func TestFixOfWhatHangsEverywhere(t *testing.T) {
	t.Parallel()
	s := newService(t, "web-1", "web-2", "web-3")
	s.release("first", s.version("0", ":"))
	s.live("app", "0", s.nodes...)
	s.release("hangs", s.version("1", "sleep 600"))
	s.eventually("it hangs on all", func() error {
		if text := strings.Join(s.lines(), "\n"); strings.Count(text, "begin") != 6 {
			return errors.New(text)
		}
		return nil
	})
	two := s.version("2", ":")
	began := time.Now()
	s.deploy(two, "canary: 1, bake: 200ms, max_unavailable: 1")
	s.stable(two)
	s.live("app", "2", s.nodes...)
	if took := time.Since(began); took > 30*time.Second {
		t.Errorf("the fix took %v", took)
	}
}
