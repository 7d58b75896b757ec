// Package inspect reads the manifests of the releases that a commit names, and checks them by the commit's
// settings.
package inspect

import (
	"cmp"
	"context"
	"fmt"
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
)

const (
	manifestsAtOnce = 8
	manifestTime    = time.Minute // to read one manifest
	maxUnread       = 10          // failures after which the remaining manifests aren't read
)

// Releases configures how the releases that a commit names are checked.
type Releases struct {
	// Objects reads the manifests.
	Objects *object.Client
	// Trust, if set, returns an error if a manifest has no valid signature, or if its signature can't
	// be read now; nil: the manifest may be used. Without Trust, only nodes check signatures.
	Trust func(ctx context.Context, p deployments.Pointer, manifest []byte) error
}

// Check reads the manifests of the releases that a tree names, as Inspect does. It checks that each exists, has the
// right digest, is trusted, parses, and does only what kedge.yaml allows for its stage. For a manifest with variables
// see checkRelease. The error is deployments.Problems, also for manifests that can't be read now.
func (r Releases) Check(ctx context.Context, tree *deployments.Tree) error {
	problems, unread := r.Inspect(ctx, tree.Settings, tree.Units)
	if problems = append(problems, unread...); len(problems) == 0 {
		return nil
	}
	slices.SortStableFunc(problems, byPlace)
	return problems
}

func byPlace(a, b deployments.Problem) int {
	return cmp.Or(strings.Compare(a.File, b.File), cmp.Compare(a.Line, b.Line))
}

// Changed returns the units in to that are new, have another release than in before, or whose stage
// has other bounds than in before. If before is nil, it returns all units in to.
func Changed(before, to *deployments.Tree) []deployments.Unit {
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

// Bounded returns the units of stages that s bounds by dests, users or commands. Only a release's
// manifest shows whether it keeps to such bounds.
func Bounded(s deployments.Settings, units []deployments.Unit) []deployments.Unit {
	return slices.DeleteFunc(slices.Clone(units),
		func(u deployments.Unit) bool { return !policy.BoundsOf(s, u.ID.Stage).NeedManifest() })
}

// Inspect reads the manifests of the units' releases, and checks them by the settings. problems are final, as a digest
// names the same manifest for ever. unread are manifests that could not be read or have no valid signature. For these a
// retry may help: the release isn't there yet, or the storage is away. problems and unread are sorted by place. Once
// unread has maxUnread entries, one for each unit, Inspect begins no further reads.
func (r Releases) Inspect(
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
		return len(unread) >= maxUnread
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
					unread = append(unread, problemOf(u, fmt.Errorf("could not read or verify the release: %w", err)))
				} else if err := checkRelease(s, u, raw); err != nil {
					problems = append(problems, problemOf(u, err))
				}
			}
			return nil
		})
	}
	_ = g.Wait() // the functions return no errors
	slices.SortFunc(problems, byPlace)
	slices.SortFunc(unread, byPlace)
	return problems, unread
}

// sourcesOf returns a check of the URLs that a release of these units may be redirected to: each unit's stage must
// allow the URL, as its nodes check the same.
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

// checkRelease returns why a unit's release must not be used, by its manifest raw; nil: it may. It is pure. A
// variable's value is known only on the unit's nodes, and may be any text, even further fields. So a manifest with
// variables is refused if the stage's bounds need it, and otherwise isn't checked here.
func checkRelease(s deployments.Settings, u deployments.Unit, raw []byte) error {
	bounds, variable := policy.BoundsOf(s, u.ID.Stage), ""
	m, err := deployments.ParseManifest(raw, u.Release.URL, func(name string) (string, bool) {
		variable = cmp.Or(variable, name)
		return "", false
	})
	switch {
	case variable != "" && bounds.NeedManifest():
		return fmt.Errorf(
			"the release's manifest has the variable %s, so what %s allows for stage %s can't be checked: "+
				"write out the value, or bound the stage in its agents' configuration instead",
			variable,
			deployments.SettingsFile,
			u.ID.Stage,
		)
	case variable != "":
		return nil
	case err != nil:
		return fmt.Errorf("%s: %w", deployments.ShownURL(u.Release.URL), err)
	}
	if err := bounds.Check(u.Release, m, namesInManifest); err != nil {
		return fmt.Errorf("the release does what %s does not allow for stage %s: %w", deployments.SettingsFile,
			u.ID.Stage, err)
	}
	return nil
}

// namesInManifest returns the names by which the mirror checks a user: only the manifest's own name, because the mirror
// doesn't know the nodes' users and groups. A group without a user has no name.
func namesInManifest(user string) []string {
	if user == "" || strings.HasPrefix(user, ":") {
		return nil
	}
	return []string{user}
}
