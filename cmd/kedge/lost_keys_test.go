package main

import (
	"encoding/json"
	"testing"
	"time"

	"kedge/deployments"
	"kedge/kv"
)

// Folder keys are deleted by the obvious commands: a pin ends on all nodes, pushes are taken, bakes end.
func TestFolderKeysDeletedUnderAgents(t *testing.T) {
	t.Parallel()
	s := newService(t, "web-1", "web-2", "web-3")
	remove := func(prefix string) { s.consul.CLI(s.consul.RootToken, "", "kv", "delete", "-recurse", "kedge/"+prefix) }
	const rollout = "canary: 1, bake: 300ms, max_unavailable: 1"
	zero := s.first(rollout)
	one, two, three, four := s.version("1", ":"), s.version("2", ":"), s.version("3", ":"), s.version("4", ":")
	s.deploy(one, rollout)
	s.stable(one)
	if _, text, code := s.kedge("pin", "prod/web/app", zero.String(), "--reason", "incident"); code != exitDone {
		t.Fatalf("kedge pin: %s", text)
	}
	s.stable(zero)
	remove("pins/prod/web/")
	s.stable(one)
	s.live("app", "1", s.nodes...)

	for _, c := range []struct {
		prefix, version string
		release         deployments.Pointer
	}{
		{"desired/", "2", two},
		{"status/", "3", three},
		{"status/prod/web/", "4", four},
	} {
		remove(c.prefix)
		s.deploy(c.release, rollout)
		s.stable(c.release)
		s.live("app", c.version, s.nodes...)
	}
	s.keeps(1)
}

// A mirror whose clock was an hour ahead began a bake, and another one, whose clock is right, goes on: it bakes for as
// long as it was to, and not for the hour.
func TestBakeBegunByAClockAhead(t *testing.T) {
	t.Parallel()
	s := newService(t, "web-1", "web-2")
	s.first("max_unavailable: 1")
	one := s.version("1", ":")
	const bake = 3 * time.Second
	s.deploy(one, "canary: 1, bake: "+bake.String()+", max_unavailable: 1")
	s.live("app", "1", s.begun("1"))
	r := s.record("it bakes", func(r deployments.Record) string {
		if r.Target != one || r.Rollout == nil || r.Rollout.HealthySince.IsZero() {
			return "it does not"
		}
		return ""
	})
	if err := s.processes["mirror-1"].stop(); err != nil {
		t.Error(err)
	}
	ahead := *r.Rollout
	ahead.Since, ahead.HealthySince = ahead.Since.Add(time.Hour), ahead.HealthySince.Add(time.Hour)
	r.Rollout = &ahead
	value, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.store.Commit(t.Context(), nil, kv.Put(kv.DesiredKey(webApp), value)); err != nil {
		t.Fatal(err)
	}
	put := time.Now()
	s.startMirror("mirror-2")
	s.stable(one)
	if took := time.Since(put); took < bake || took > 30*time.Second {
		t.Errorf("it ended %v after the clock was put right, want %v and a little", took, bake)
	}
	s.keeps(1)
}
