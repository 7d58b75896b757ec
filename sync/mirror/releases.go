package mirror

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"kedge/artifact"
	"kedge/artifact/object"
	"kedge/deployments"
	"kedge/policy"
	"kedge/sync/git"
)

const (
	manifestsAtOnce = 8
	manifestTime    = time.Minute // for one to be read
	unreadMost      = 10          // manifests that can't be read, before the rest isn't asked for
)

// Releases is how the releases that a commit names are looked at.
type Releases struct {
	// Objects reads their manifests.
	Objects *object.Client
	// Trust, where set, reports why a manifest's bytes must not be used: it bears no signature that counts. Without
	// it, signatures are the nodes' to check.
	Trust func(ctx context.Context, p deployments.Pointer, manifest []byte) error
}

// Check reads the manifest of every release that a tree names: whether it is there, has its digest and parses, is
// to be trusted, and does only what kedge.yaml allows for its stage. The error is Problems, also of what can't be
// read now.
func (r Releases) Check(ctx context.Context, tree *deployments.Tree) error {
	problems, unread := r.inspect(ctx, tree.Settings, tree.Units)
	if problems = append(problems, unread...); len(problems) == 0 {
		return nil
	}
	slices.SortStableFunc(problems, byPlace)
	return problems
}

func byPlace(a, b deployments.Problem) int {
	return cmp.Or(strings.Compare(a.File, b.File), cmp.Compare(a.Line, b.Line))
}

// changed returns the units of a tree whose release, or what releases of its stage may do, isn't as it was; before
// nil: all.
func changed(before, to *deployments.Tree) []deployments.Unit {
	if before == nil {
		return to.Units
	}
	had := make(map[deployments.UnitID]deployments.Pointer, len(before.Units))
	for _, u := range before.Units {
		had[u.ID] = u.Release
	}
	same := map[string]bool{} // by stage
	var units []deployments.Unit
	for _, u := range to.Units {
		stage := u.ID.Stage
		if _, known := same[stage]; !known {
			same[stage] = reflect.DeepEqual(policy.BoundsOf(before.Settings, stage), policy.BoundsOf(to.Settings, stage))
		}
		if had[u.ID] != u.Release || !same[stage] {
			units = append(units, u)
		}
	}
	return units
}

// bounded returns the units whose releases take a look at the manifest to tell whether they are allowed.
func bounded(s deployments.Settings, units []deployments.Unit) []deployments.Unit {
	return slices.DeleteFunc(
		slices.Clone(units),
		func(u deployments.Unit) bool { return !policy.BoundsOf(s, u.ID.Stage).OnManifests() },
	)
}

// BoundsReleases reports whether it takes a look at manifests to tell that a tree's releases are allowed.
func BoundsReleases(tree *deployments.Tree) bool { return len(bounded(tree.Settings, tree.Units)) > 0 }

// inspect reads the manifests of the units' releases, and holds them to the settings. problems are for good: a
// digest names a manifest for ever. unread are those that could not be read, or whose signature doesn't count,
// which may pass: they aren't there yet, or the storage is away. Both are sorted.
func (r Releases) inspect(
	ctx context.Context,
	s deployments.Settings,
	units []deployments.Unit,
) (problems, unread deployments.Problems) {
	byRelease := map[deployments.Pointer][]deployments.Unit{}
	var releases []deployments.Pointer
	for _, u := range units {
		if byRelease[u.Release] == nil {
			releases = append(releases, u.Release)
		}
		byRelease[u.Release] = append(byRelease[u.Release], u)
	}
	var mu sync.Mutex
	enough := func() bool {
		mu.Lock()
		defer mu.Unlock()
		return len(unread) >= unreadMost
	}
	var g errgroup.Group
	g.SetLimit(manifestsAtOnce)
	for _, p := range releases {
		if enough() {
			break
		}
		g.Go(func() error {
			raw, err := r.read(object.WithRedirect(ctx, sourcesOf(s, byRelease[p])), p)
			mu.Lock()
			defer mu.Unlock()
			for _, u := range byRelease[p] {
				if err != nil {
					unread = append(unread, problemOf(u, fmt.Errorf("the release can't be checked: %w", err)))
				} else if err := checkRelease(s, u, raw); err != nil {
					problems = append(problems, problemOf(u, err))
				}
			}
			return nil
		})
	}
	_ = g.Wait() // its functions give none
	slices.SortFunc(problems, byPlace)
	slices.SortFunc(unread, byPlace)
	return problems, unread
}

// sourcesOf returns why a redirect of what units share may not lead to a URL: each of their stages must allow it, as
// its nodes will hold to it.
func sourcesOf(s deployments.Settings, units []deployments.Unit) func(url string) error {
	return func(url string) error {
		for _, u := range units {
			if err := policy.BoundsOf(s, u.ID.Stage).CheckSource(url); err != nil {
				return err
			}
		}
		return nil
	}
}

func problemOf(u deployments.Unit, err error) deployments.Problem {
	return deployments.Problem{File: u.Place.File, Line: u.Place.Line, Column: u.Place.Column, Message: err.Error()}
}

func (r Releases) read(ctx context.Context, p deployments.Pointer) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, manifestTime)
	defer cancel()
	raw, err := artifact.ReadManifest(ctx, r.Objects, p)
	if err == nil && r.Trust != nil {
		err = r.Trust(ctx, p, raw)
	}
	return raw, err
}

// checkRelease reports why a unit's release must not be used, by its manifest's bytes; pure. What a variable in it
// would become is known on the unit's nodes only, and may be any text, more fields among them.
func checkRelease(s deployments.Settings, u deployments.Unit, raw []byte) error {
	bounds, variable := policy.BoundsOf(s, u.ID.Stage), ""
	m, err := deployments.ParseManifest(raw, u.Release.URL, func(name string) (string, bool) {
		variable = cmp.Or(variable, name)
		return "", false
	})
	switch {
	case variable != "" && bounds.OnManifests():
		return fmt.Errorf(
			"its manifest has the variable %s, and so can't be held to what %s allows for stage %s: write out its value, "+
				"or bound the stage in its agents' configuration instead",
			variable,
			deployments.SettingsFile,
			u.ID.Stage,
		)
	case variable != "":
		return nil
	case err != nil:
		return fmt.Errorf("%s: %w", u.Release.URL, err)
	}
	if err := bounds.Check(u.Release, m, asWritten); err != nil {
		return fmt.Errorf(
			"the release does what %s does not allow for stage %s: %w",
			deployments.SettingsFile,
			u.ID.Stage,
			err,
		)
	}
	return nil
}

// asWritten returns the names by which a user is checked in the mirror: its manifest's own, as the mirror knows no
// node's users or groups. Of its groups nothing is.
func asWritten(user string) []string {
	if user == "" || strings.HasPrefix(user, ":") {
		return nil
	}
	return []string{user}
}

// CheckPush is a pre-receive hook: it reads "OLD NEW REF" lines from stdin, as githooks(5) gives them, and refuses
// what the mirror would not take: an invalid tree, a rewritten history, a removal of too many units, the removal of
// the branch. Only branches are looked at: those given, or else main and the one that HEAD names. path is as
// Config.Path. With releases it refuses as well what Releases.Check says of those that the push changes. It runs in
// the receiving repository's environment, where pushed objects lie in a quarantine.
func CheckPush(
	ctx context.Context,
	repoDir, path string,
	stdin io.Reader,
	releases *Releases,
	branches ...string,
) error {
	from, likely, err := git.OpenReceiving(repoDir, path, os.Getenv)
	if err != nil {
		return err
	}
	defer from.Close()
	if len(branches) == 0 {
		branches = likely
	}
	updates, err := git.ReadUpdates(stdin)
	refusals := []error{err}
	for _, u := range updates {
		if !slices.Contains(branches, u.Branch) {
			continue
		}
		if err := checkUpdate(ctx, from, releases, u); err != nil {
			refusals = append(refusals, fmt.Errorf("branch %s is not updated:\n%w", u.Branch, err))
		}
	}
	return errors.Join(refusals...)
}

// checkUpdate checks one branch's move.
func checkUpdate(ctx context.Context, from *git.Objects, releases *Releases, u git.Update) error {
	if u.New == "" {
		return errors.New("it is what the mirror follows, and can't be removed")
	}
	to, err := from.Load(u.New, nil)
	if err != nil {
		return err
	}
	var before *deployments.Tree // nil: there is none that sets rules, or has releases that were looked at
	if u.Old != "" {
		last, err := from.Load(u.Old, nil)
		switch {
		case errors.As(err, new(*git.BadCommit)): // it was not taken
		case err != nil:
			return err
		default:
			before = last.Tree
			m := candidate{from: last.Hash, rules: rulesOf(last), to: to}
			for _, u := range before.Units {
				m.had = append(m.had, u.ID)
			}
			if m.descends, err = from.Descends(ctx, u.Old, u.New); err != nil {
				return err
			}
			if err := refuse(m); err != nil {
				return err
			}
		}
	}
	if releases == nil {
		return nil
	}
	tree := *to.Tree
	tree.Units = changed(before, to.Tree)
	return releases.Check(ctx, &tree)
}
