package deploy

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"kedge/artifact"
	"kedge/deployments"
	"kedge/deployments/durable"
)

const (
	journalFile  = "journal.json"
	manifestsDir = "manifests"
	treesDir     = "trees"
	madeDir      = "made"
	beforeDir    = "before"

	// maxQuarantined bounds the list, which every report carries; the oldest go first.
	maxQuarantined = 16
)

// journal is what a unit knows across a crash. It is replaced as a whole, so that it is never half written. Only
// the goroutine that calls the unit's methods writes it.
type journal struct {
	Format int `json:"format"` // 1
	// Running is what was switched to last, Confirmed whether it passed its health checks.
	Running   deployments.Pointer `json:"running,omitzero"`
	Version   string              `json:"version,omitempty"`
	Confirmed bool                `json:"confirmed,omitempty"`
	// Proven is the boot in which Running passed them last.
	Proven   string              `json:"proven,omitempty"`
	LastGood deployments.Pointer `json:"last_good,omitzero"`
	Staged   deployments.Pointer `json:"staged,omitzero"`
	// Newest is the newest Created of a signed release that was settled on: see Unit.Settle. Floors has it as well.
	Newest time.Time `json:"newest,omitzero"`
	Ahead  *ahead    `json:"ahead,omitempty"`

	Quarantined []Failure `json:"quarantined,omitempty"`
	Drained     bool      `json:"drained,omitempty"`
	// Deployment is the one under way; nil: none.
	Deployment *deployment `json:"deployment,omitempty"`
	// Compared is of the deployment under way, or of what runs.
	Compared *deployments.Compared `json:"compared,omitempty"`
	// Attempts are those of steps that were cut off, until their release is confirmed or in quarantine.
	Attempts []attempt `json:"attempts,omitempty"`
	// Before is what was at dest before the first release; nil: nothing was, or it is kept no more. Restored is the
	// release that was left for it, or failed, while dest holds it again.
	Before   *before            `json:"before,omitempty"`
	Restored deployments.Digest `json:"restored,omitzero"`
	// Told names the release and the key whose failure commands ran because it could not be staged.
	Told string `json:"told,omitempty"`
}

// Failure is a release that failed on this node, and stays in quarantine until Retry.
type Failure struct {
	Digest deployments.Digest `json:"digest"`
	// Key names what asked for the release: see Request. Empty: a version that didn't keep it wrote the journal.
	Key  string              `json:"key,omitempty"`
	Step string              `json:"step"`
	Back deployments.Pointer `json:"back,omitzero"` // what the unit went back to
	// Reason is the error's text.
	Reason string    `json:"reason"`
	At     time.Time `json:"at"` // the node's clock; for people
}

// Err returns the error that Deploy returned when the release p failed.
func (f Failure) Err(p deployments.Pointer) *Failed {
	return &Failed{
		Release: p, Back: f.Back, Step: f.Step, Err: errors.New(f.Reason),
		Reason: deployments.ReasonQuarantined, Facts: deployments.Facts{"step": f.Step, "error": f.Reason},
	}
}

// deployment is a deployment under way.
type deployment struct {
	Release deployments.Pointer `json:"release"`
	// From ran when it began, and is what it is taken back to before the switch. Back is the last good release, which
	// a failure goes back to. Zero: there is none.
	From   deployments.Pointer `json:"from,omitzero"`
	Back   deployments.Pointer `json:"back,omitzero"`
	Commit string              `json:"commit,omitempty"`
	Key    string              `json:"key,omitempty"`
	// Step is being done: all before it are done, and it may be half done, or done. Doing it again is safe.
	Step step `json:"step"`
	// Run marks the processes of Step's commands.
	Run string `json:"run"`
	// Boot is the one in which Step was begun.
	Boot string `json:"boot,omitempty"`
	// Touched is set from when dest may have changed.
	Touched bool `json:"touched,omitempty"`
	// Adopted is set where dest was the release's before, so that no command runs.
	Adopted bool `json:"adopted,omitempty"`
	// Over is set where another one, which this one superseded, may have changed dest before.
	Over bool `json:"over,omitempty"`
	// Fault is set once the deployment failed, and goes back.
	Fault *fault `json:"fault,omitempty"`
	// Restored is set once what was at dest before the first release is back there.
	Restored bool `json:"restored,omitempty"`
	// Leaves is set if it goes from the release that runs to what was at dest before the first one: see Leave. Versions
	// before this one take it for a deployment that was stopped, and stay on the release.
	Leaves bool `json:"leaves,omitempty"`
	// Unserved is set while what it goes back to doesn't serve yet.
	Unserved *unserved `json:"unserved,omitempty"`
}

// unserved says why the release that a deployment went back to doesn't serve.
type unserved struct {
	Step  step      `json:"step"`
	Check string    `json:"check,omitempty"` // the one that failed
	Error string    `json:"error"`
	Since time.Time `json:"since"`
}

// fault says why a deployment goes back.
type fault struct {
	Step   step   `json:"step"`
	Reason string `json:"reason"`
	Check  string `json:"check,omitempty"` // the one that failed in step health
	Told   bool   `json:"told,omitempty"`  // its failure commands ran before their turn

	err error // Reason's, in the process in which it happened
}

// save makes change durable in the journal, and only then visible. A change that can't be written leaves the unit
// as it was.
func (u *Unit) save(change func(*journal)) error {
	next := u.j
	next.Quarantined, next.Attempts = slices.Clone(u.j.Quarantined), slices.Clone(u.j.Attempts)
	if u.j.Deployment != nil {
		d := *u.j.Deployment
		next.Deployment = &d
	}
	change(&next)
	next.Format = 1
	if d, was := next.Deployment, u.j.Deployment; d != nil && (was == nil || d.Run != was.Run) {
		d.Boot = u.boot
	}
	data, err := json.MarshalIndent(next, "", "  ")
	if err != nil {
		return fmt.Errorf("writing the journal of %s: %w", u.name(), err)
	}
	if err := durable.WriteFile(filepath.Join(u.c.Dir, journalFile), data, 0o600); err != nil {
		return fmt.Errorf("writing the journal of %s: %w", u.name(), err)
	}
	u.mu.Lock()
	u.j = next
	u.mu.Unlock()
	return nil
}

// failed reports whether p is in quarantine.
func (j *journal) failed(p deployments.Pointer) bool {
	return slices.ContainsFunc(j.Quarantined, func(f Failure) bool { return f.Digest == p.Digest })
}

// enter says that s begins.
func (d *deployment) enter(s step) {
	d.Step, d.Run = s, rand.Text()
	d.Touched = d.Touched || s == stepSwitch
}

// load reads the journal. One that doesn't parse is put aside, and what runs is told from dest.
func (u *Unit) load() error {
	path := filepath.Join(u.c.Dir, journalFile)
	// What a kill left of a file that was being written aside.
	if aside, err := filepath.Glob(filepath.Join(u.c.Dir, "."+journalFile+"*")); err == nil {
		for _, f := range aside {
			os.Remove(f)
		}
	}
	j, err := durable.ReadState(path, func(j journal) error {
		if j.Deployment != nil && !j.Deployment.Step.known() {
			return fmt.Errorf("it has a deployment in step %q", j.Deployment.Step)
		}
		return nil
	})
	var damaged *durable.DamagedError
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err == nil:
		u.j = j
		return nil
	case !errors.As(err, &damaged):
		return fmt.Errorf("reading the journal of %s: %w", u.name(), err)
	}
	u.log.Error("the journal is damaged: putting it aside and reading what runs from dest",
		"kept", damaged.Kept, "error", damaged.Err)
	running, version := u.salvage()
	return u.save(func(j *journal) { j.Running, j.LastGood, j.Version = running, running, version })
}

// salvage finds what runs without a journal: what the newest manifest's dest links to. It is the best there is to
// go back to, but not taken for confirmed, so that deploying it again proves it. Without a link of ours it isn't
// known at all.
func (u *Unit) salvage() (running deployments.Pointer, version string) {
	entries, err := os.ReadDir(filepath.Join(u.c.Dir, manifestsDir))
	if err != nil {
		return running, ""
	}
	var newest time.Time
	for _, e := range entries {
		info, err := e.Info()
		if err != nil || info.ModTime().Before(newest) {
			continue
		}
		r, err := artifact.ReadRelease(filepath.Join(u.c.Dir, manifestsDir, e.Name()))
		if err != nil || r.Manifest.Src == "" || r.Manifest.Strategy != deployments.StrategyRelease {
			continue
		}
		live, err := artifact.Open(r.Manifest.Dest, u.c.Objects, u.log).Current()
		if err != nil {
			continue
		}
		newest, running, version = info.ModTime(), live.Pointer, live.Manifest.Version
	}
	return running, version
}

func (u *Unit) manifestFile(d deployments.Digest) string {
	return filepath.Join(u.manifestsDir(), d.String()+".json")
}

// remember keeps r's manifest, so that going back to it needs neither network nor environment.
func (u *Unit) remember(r *artifact.Release) error {
	path := u.manifestFile(r.Pointer.Digest)
	if old, err := artifact.ReadRelease(path); err == nil && bytes.Equal(old.Raw, r.Raw) && old.Pointer == r.Pointer {
		return nil
	}
	if err := artifact.WriteRelease(path, r); err != nil {
		return fmt.Errorf("keeping the manifest of %s: %w", r.Pointer.Digest.Short(), err)
	}
	return nil
}

// recall reads a release that was remembered; nil for the zero pointer.
func (u *Unit) recall(p deployments.Pointer) (*artifact.Release, error) {
	if p.IsZero() {
		return nil, nil
	}
	r, err := artifact.ReadRelease(u.manifestFile(p.Digest))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("the manifest of %s is not kept on this node", p)
	}
	if err == nil {
		u.secrets.add(r.Manifest.Masked...)
	}
	return r, err
}
