package demo

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"kedge/deployments"
	"kedge/kv"
	"kedge/sync/fleet"
)

// stepTimeout bounds each wait for nodes in the walk. It is far longer than any wait takes, so a fault ends in an
// error.
const stepTimeout = time.Minute

// ErrNotConverged is wrapped by the error of Walk if a step waits for nodes for longer than stepTimeout.
var ErrNotConverged = errors.New("not converged in time")

// Walk plays an operator's day step by step, and prints each step with its duration. An error contains the last lines
// of each process's log.
func (d *Demo) Walk() error {
	say := func(took time.Duration, format string, args ...any) {
		fmt.Fprintf(d.Out, "%9s  %s\n", took.Round(100*time.Microsecond), fmt.Sprintf(format, args...))
	}
	timed := func(what string, f func() error) error {
		start := time.Now()
		if err := f(); err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
		say(time.Since(start), "%s", what)
		return nil
	}
	all := []string{"web-1", "web-2", "web-3"}

	fmt.Fprintf(d.Out, "kedge demo in %s\n\n", d.dir)
	steps := []struct {
		what string
		do   func() error
	}{
		{"start a mirror and three agents", func() error {
			if err := d.startMirror(); err != nil {
				return err
			}
			for _, node := range all {
				if err := d.startNode(node); err != nil {
					return err
				}
			}
			return d.publishAndSay(firstVersion)
		}},
		{
			"git push " + firstVersion + ": all three nodes are live",
			func() error { return d.pushAndWait(firstVersion, all...) },
		},
		{"publish " + secondVersion, func() error { return d.publishAndSay(secondVersion) }},
		{"git push " + secondVersion + ": all three switched", func() error { return d.pushAndWait(secondVersion, all...) }},
		{"pin to " + firstVersion + " by writing its pointer to the pin's key: all three follow", func() error {
			pin := filepath.Join(d.dir, "kv", kv.PinKey(demoUnit))
			if err := os.MkdirAll(filepath.Dir(pin), 0o755); err != nil {
				return err
			}
			if err := os.WriteFile(pin, []byte(d.pointers[firstVersion].String()+"\n"), 0o644); err != nil {
				return err
			}
			return d.wait(firstVersion, all...)
		}},
		{"unpin: back to what Git says", func() error {
			if _, err := fleet.Unpin(d.ctx, d.store, demoUnit, ""); err != nil {
				return err
			}
			return d.wait(secondVersion, all...)
		}},
		{"web-4 boots late, and ends where the others are", func() error {
			if err := d.startNode("web-4"); err != nil {
				return err
			}
			all = append(all, "web-4")
			return d.wait(secondVersion, all...)
		}},
		{"git push " + brokenVersion + ", whose health check fails: every node goes back to " + secondVersion, func() error {
			if err := d.publishAndSay(brokenVersion); err != nil {
				return err
			}
			if err := d.push(brokenVersion); err != nil {
				return err
			}
			bad := d.pointers[brokenVersion].Digest
			if err := d.until(func(n fleet.Node) string {
				if n.Report.State != deployments.StateQuarantined || n.Report.Want.Digest != bad {
					return "has not refused " + brokenVersion
				}
				return ""
			}, all...); err != nil {
				return err
			}
			return d.checkLive(secondVersion, all...)
		}},
		{
			"git push the fix (" + secondVersion + " again): converged",
			func() error { return d.pushAndWait(secondVersion, all...) },
		},
	}
	for _, step := range steps {
		if err := timed(step.what, step.do); err != nil {
			return fmt.Errorf("%w\n%s", err, d.logs())
		}
	}
	fmt.Fprintln(d.Out, "\nThe same with a fleet to look at, and for you to push to:  kedge demo")
	return nil
}

func (d *Demo) publishAndSay(version string) error {
	start := time.Now()
	p, err := d.publish(version)
	if err != nil {
		return err
	}
	line := fmt.Sprintf("published app %s: %d files, archive %d bytes", version, p.Files, p.Archive)
	for _, delta := range p.Deltas {
		line += fmt.Sprintf(", delta from %s %d bytes", delta.From.Digest.Short(), delta.Bytes)
	}
	fmt.Fprintf(d.Out, "%9s    %s\n", time.Since(start).Round(100*time.Microsecond), line)
	return nil
}

// pushAndWait pushes a version and waits until nodes run it; the time from the push's return is printed on its own.
func (d *Demo) pushAndWait(version string, nodes ...string) error {
	if err := d.push(version); err != nil {
		return err
	}
	pushed := time.Now()
	if err := d.wait(version, nodes...); err != nil {
		return err
	}
	fmt.Fprintf(d.Out, "%9s    from the push's return to the last node's report\n",
		time.Since(pushed).Round(100*time.Microsecond))
	return nil
}

// wait waits until nodes report that they run version, healthy, and checks the files that they serve.
func (d *Demo) wait(version string, nodes ...string) error {
	want := d.pointers[version].Digest
	if err := d.until(func(n fleet.Node) string {
		if n.Report.State != deployments.StateConverged || n.Report.Running.Digest != want {
			return fmt.Sprintf("is %s on %s, not converged on %s: %s", n.Report.State, n.Report.Version, version, n.Report.Error)
		}
		return ""
	}, nodes...); err != nil {
		return err
	}
	return d.checkLive(version, nodes...)
}

// until waits until missing returns "" for each of nodes. After stepTimeout it returns an error that wraps
// ErrNotConverged.
func (d *Demo) until(missing func(fleet.Node) string, nodes ...string) error {
	ctx, cancel := context.WithTimeout(d.ctx, stepTimeout)
	defer cancel()
	why := "nothing was reported"
	done := errors.New("done")
	ctx, finish := context.WithCancelCause(ctx)
	defer finish(nil)
	err := fleet.Watch(ctx, d.store, fleet.Filter{}, func(f *fleet.Fleet) {
		why = ""
		for _, name := range nodes {
			if w := missingOn(f, name, missing); w != "" {
				why = name + " " + w
				return
			}
		}
		finish(done)
	})
	switch {
	case context.Cause(ctx) == done:
		return nil
	case d.ctx.Err() != nil:
		return d.ctx.Err()
	case ctx.Err() != nil:
		return fmt.Errorf("%w: after %s, %s", ErrNotConverged, stepTimeout, why)
	}
	return err
}

func missingOn(f *fleet.Fleet, name string, missing func(fleet.Node) string) string {
	for _, u := range f.Units {
		for _, n := range u.Nodes {
			if u.ID == demoUnit && n.Name == name {
				return missing(n)
			}
		}
	}
	return "has not reported"
}

// checkLive checks the live files themselves, as a report may be wrong.
func (d *Demo) checkLive(version string, nodes ...string) error {
	for _, name := range nodes {
		got, err := os.ReadFile(filepath.Join(d.dir, "nodes", name, "srv", "app", "VERSION"))
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if v := strings.TrimSpace(string(got)); v != version {
			return fmt.Errorf("%s serves %s, not %s", name, v, version)
		}
	}
	return nil
}

// logs returns the last eight lines of every process's log, for an error.
func (d *Demo) logs() string {
	var b strings.Builder
	files, _ := filepath.Glob(filepath.Join(d.dir, "logs", "*.log"))
	for _, file := range files {
		data, _ := os.ReadFile(file)
		lines := strings.Split(strings.TrimSpace(string(data)), "\n")
		fmt.Fprintf(&b, "\n%s, the last lines:\n  %s\n", filepath.Base(file),
			strings.Join(lines[max(0, len(lines)-8):], "\n  "))
	}
	return b.String()
}
