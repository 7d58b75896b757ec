package main

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"kedge/artifact"
	"kedge/deployments"
	"kedge/kv"
)

// service is a world whose releases say when a node is out of service: from their pre command on until they have
// succeeded, or the node is back on what it ran.
type service struct {
	*world
	nodes []string
	log   string
}

// newService starts a mirror and the nodes' agents.
func newService(t *testing.T, nodes ...string) *service {
	t.Helper()
	s := &service{world: newWorld(t, nodes...), nodes: nodes}
	s.begin()
	for _, node := range nodes {
		s.startAgent(node)
	}
	return s
}

// begin starts the log of commands, and a mirror.
func (s *service) begin() {
	s.t.Helper()
	s.log = filepath.Join(s.dir, "commands.log")
	if err := os.WriteFile(s.log, nil, 0o600); err != nil {
		s.t.Fatal(err)
	}
	s.startMirror("mirror-1")
}

// version publishes a release of the app whose post command is post. It is healthy on a node unless sick has made
// it otherwise.
func (s *service) version(version, post string) deployments.Pointer {
	s.t.Helper()
	say := func(what string) []deployments.Command {
		return []deployments.Command{{Run: fmt.Sprintf("echo %s $KEDGE_NODE %s >> %s", what, version, s.log)}}
	}
	return s.publish("app", version, func(o *artifact.PublishOptions) {
		o.Manifest.Commands = deployments.Commands{
			Pre: say("begin"), Success: say("end"), Failure: say("end"),
			Post: append([]deployments.Command{{Run: post}}, say("post")...),
		}
		o.Manifest.Health = deployments.Health{
			Timeout: 2 * time.Second, Every: 200 * time.Millisecond, Failures: 2,
			Checks: []deployments.Check{{
				Exec:     "! test -e {{ must_env `SRV` }}/sick-" + version,
				Interval: 200 * time.Millisecond,
			}},
		}
	})
}

// sick lets the checks of a version fail on nodes from now on.
func (s *service) sick(version string, nodes ...string) {
	s.t.Helper()
	for _, node := range nodes {
		if err := os.WriteFile(filepath.Join(s.srv(node), "sick-"+version), nil, 0o600); err != nil {
			s.t.Fatal(err)
		}
	}
}

// deploy pushes a release of the app, with the fields of its rollout.
func (s *service) deploy(p deployments.Pointer, rollout string) (commit string) {
	s.t.Helper()
	file := fmt.Sprintf("release: %s\nrollout: {%s}\n", p, rollout)
	return s.push("deploy "+p.URL, map[string]*string{webApp.String(): &file})
}

// record waits until the app's record is as want says; want returns what is wrong.
func (s *service) record(what string, want func(deployments.Record) string) (r deployments.Record) {
	s.t.Helper()
	s.eventually(what, func() error {
		e, err := s.store.Get(s.t.Context(), kv.DesiredKey(webApp))
		if err != nil {
			return err
		}
		if r, err = deployments.ParseRecord(e.Value); err != nil {
			return err
		}
		if wrong := want(r); wrong != "" {
			return fmt.Errorf("%s: %s", wrong, e.Value)
		}
		return nil
	})
	return r
}

// stable waits until a release is what all nodes are to run, and each has said that it does.
func (s *service) stable(p deployments.Pointer) {
	s.t.Helper()
	s.record(p.URL+" is stable", func(r deployments.Record) string {
		if r.Rollout != nil || r.Target != p {
			return "it is not yet"
		}
		return ""
	})
	for _, node := range s.nodes {
		s.reported(node, "app", func(u deployments.UnitReport) string {
			if u.State != deployments.StateConverged || u.Running != p {
				return "it has not converged"
			}
			return ""
		})
	}
}

// first brings release 0 to all nodes, which have yet to serve anything, and so take it at once.
func (s *service) first(rollout string) deployments.Pointer {
	s.t.Helper()
	zero := s.version("0", ":")
	s.deploy(zero, rollout)
	s.stable(zero)
	if err := os.Truncate(s.log, 0); err != nil {
		s.t.Fatal(err)
	}
	return zero
}

// lines are what the releases' commands have said.
func (s *service) lines() []string {
	s.t.Helper()
	text, err := os.ReadFile(s.log)
	if err != nil {
		s.t.Fatal(err)
	}
	return strings.Split(strings.TrimSuffix(string(text), "\n"), "\n")
}

// begun waits until a version has begun on a node, and returns the node.
func (s *service) begun(version string) (node string) {
	s.t.Helper()
	s.eventually(version+" begins", func() error {
		for _, line := range s.lines() {
			if fields := strings.Fields(line); len(fields) == 3 && fields[0] == "begin" && fields[2] == version {
				node = fields[1]
				return nil
			}
		}
		return fmt.Errorf("it has not")
	})
	return node
}

// keeps fails the test if more than budget nodes were ever out of service together. One that begins again, after its
// agent was restarted, has been out all the time.
func (s *service) keeps(budget int) {
	s.t.Helper()
	out := map[string]string{}
	for i, line := range s.lines() {
		fields := strings.Fields(line)
		if len(fields) != 3 {
			continue
		}
		if fields[0] == "end" || fields[0] == "post" && out[fields[1]] != fields[2] { // or it went back to that one
			delete(out, fields[1])
		}
		if fields[0] != "begin" {
			continue
		}
		out[fields[1]] = fields[2]
		if len(out) > budget {
			s.t.Errorf("%d nodes are out of service, %d may: %v, in line %d of\n%s", len(out), budget, out, i+1,
				strings.Join(s.lines(), "\n"))
			return
		}
	}
}

// An agent that leaves in mid-switch holds its node's place until it is back: nobody else is let in for it, whether
// it is restarted alone, or with others, or with all, and whether or not it could say goodbye.
func TestAgentsRestartedInMidSwitch(t *testing.T) {
	t.Parallel()
	s := newService(t, "web-1", "web-2", "web-3", "web-4")
	const rollout = "canary: 1, bake: 200ms, max_unavailable: 1"
	s.first(rollout)
	for i, c := range []struct {
		restarted int
		end       func(*process)
	}{
		{1, func(p *process) { _ = p.stop() }},
		{2, func(p *process) { _ = p.stop() }},
		{3, (*process).kill},
		{4, func(p *process) { _ = p.stop() }},
	} {
		version := fmt.Sprint(i + 1)
		p := s.version(version, "sleep 0.7")
		s.deploy(p, rollout)
		nodes := []string{s.begun(version)}
		for _, node := range s.nodes {
			if node != nodes[0] && len(nodes) < c.restarted {
				nodes = append(nodes, node)
			}
		}
		var ended sync.WaitGroup
		for _, node := range nodes {
			ended.Go(func() { c.end(s.processes[node]) })
		}
		ended.Wait()
		for _, node := range nodes {
			s.startAgent(node)
		}
		s.stable(p)
		s.live("app", version, s.nodes...)
	}
	s.keeps(1)
}

// A node whose release failed, and which is unhealthy on what it went back to, holds its place in the rollback,
// too: the next node goes back once it serves again.
func TestRollbackWaitsForANodeThatServesNothing(t *testing.T) {
	t.Parallel()
	s := newService(t, "web-1", "web-2", "web-3")
	const rollout = "max_unavailable: 1"
	zero := s.first(rollout)
	// It succeeds on the first node. On the second one it breaks what ran before, too.
	one := s.version("1", "mkdir "+s.log+".once || { touch {{ must_env `SRV` }}/sick-0; exit 1; }")
	s.deploy(one, rollout)
	first := s.begun("1")
	r := s.record("the rollback", func(r deployments.Record) string {
		if r.Rollout == nil || r.Rollout.Phase != deployments.PhaseRollingBack {
			return "it has not begun"
		}
		return ""
	})
	broken := r.Rollout.Facts["node"]
	s.reported(broken, "app", func(u deployments.UnitReport) string {
		if u.Generation != r.Generation || u.State != deployments.StateUnhealthy || !u.RollingBack {
			return "it is not on its way back by the rollback"
		}
		return ""
	})
	// Once the mirror has taken another push, it has seen that report, too.
	other := deployments.UnitID{Stage: "prod", Role: "db", Unit: "main"}
	file := fmt.Sprintf("release: %s\n", zero)
	s.push("another unit", map[string]*string{other.String(): &file})
	s.eventually("the other unit", func() error {
		_, err := s.store.Get(t.Context(), kv.DesiredKey(other))
		return err
	})
	log, err := os.OpenFile(s.log, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	if _, err := log.WriteString("healed\n"); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(s.srv(broken), "sick-0")); err != nil {
		t.Fatal(err)
	}
	for _, node := range s.nodes {
		s.reported(node, "app", func(u deployments.UnitReport) string {
			if u.Running != zero || u.State != deployments.StateConverged && u.State != deployments.StateQuarantined {
				return "it is not back"
			}
			return ""
		})
	}
	lines := s.lines()
	healed, back := slices.Index(lines, "healed"), slices.Index(lines, "begin "+first+" 0")
	if broken == first || healed < 0 || back < healed {
		t.Errorf("%s goes back before %s serves:\n%s", first, broken, strings.Join(lines, "\n"))
	}
}

// Nodes that come back with a release that neither stable nor the target is go to stable first. When the target has
// failed on them, a rollback leaves them there: they don't leave their old release all at once for it.
func TestReturnedNodesGoByWayOfStable(t *testing.T) {
	t.Parallel()
	s := newService(t, "web-1", "web-2", "web-3", "web-4", "web-5")
	const rollout = "max_unavailable: 1, max_failures: 5, deadline: 10s"
	s.first(rollout)
	away := s.nodes[:2]
	for _, node := range away {
		if err := s.processes[node].stop(); err != nil {
			t.Fatal(err)
		}
	}
	one := s.version("1", "sleep 0.7")
	s.deploy(one, rollout)
	s.record("release 1 is stable without them", func(r deployments.Record) string {
		if r.Rollout != nil || r.Target != one {
			return "it is not yet"
		}
		return ""
	})
	s.sick("2", away...)
	s.deploy(s.version("2", "sleep 0.7"), rollout+", bake: 1h")
	s.begun("2")
	for _, node := range away {
		s.startAgent(node)
	}
	for _, node := range away {
		s.reported(node, "app", func(u deployments.UnitReport) string {
			if u.State != deployments.StateQuarantined || u.Running != one {
				return "release 2 has yet to fail there, on release 1"
			}
			return ""
		})
	}
	if out, errs, code := s.kedge("abort", webApp.String()); code != 0 {
		t.Fatalf("abort: exit %d: %s%s", code, out, errs)
	}
	for _, node := range s.nodes {
		s.reported(node, "app", func(u deployments.UnitReport) string {
			if u.Running != one || u.State != deployments.StateConverged {
				return "it is not back on release 1"
			}
			return ""
		})
	}
	s.keeps(1)
}
