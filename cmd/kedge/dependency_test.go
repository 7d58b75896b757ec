package main

import (
	"testing"

	"kedge/artifact"
	"kedge/deployments"
)

// A dependency whose last release failed serves on with the one before: what depends on it is pinned, and let go,
// all the same.
func TestPinBesideABadDependency(t *testing.T) {
	if testing.Short() {
		t.Skip("needs Consul and S3")
	}
	t.Parallel()
	w := newWorld(t, "web-1")
	w.startMirror("mirror-1")
	w.startAgent("web-1")
	base, one, two := w.publish("base", "1"), w.publish("app", "1"), w.publish("app", "2")
	bad := w.publish("base", "2", func(o *artifact.PublishOptions) {
		o.Manifest.Commands.Post = []deployments.Command{{Run: "exit 1"}}
	})
	baseFile, appFile := "release: "+base.String()+"\n", "release: "+one.String()+"\nafter: [base]\n"
	w.push("first", map[string]*string{"prod/web/base": &baseFile, "prod/web/app": &appFile})
	w.live("app", "1", "web-1")
	badFile := "release: " + bad.String() + "\n"
	w.push("a bad base", map[string]*string{"prod/web/base": &badFile})
	w.reported("web-1", "base", func(u deployments.UnitReport) string {
		if u.State != deployments.StateQuarantined {
			return "the bad release is not in quarantine"
		}
		return ""
	})
	w.live("base", "1", "web-1")
	if _, errs, code := w.kedge("pin", "prod/web/app", two.String(), "--reason", "incident"); code != exitDone {
		t.Fatalf("kedge pin: exit %d\n%s", code, errs)
	}
	w.live("app", "2", "web-1")
	if _, errs, code := w.kedge("unpin", "prod/web/app"); code != exitDone {
		t.Fatalf("kedge unpin: exit %d\n%s", code, errs)
	}
	w.live("app", "1", "web-1")
}
