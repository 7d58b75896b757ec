package deployments

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/goccy/go-yaml/ast"
	"github.com/robfig/cron/v3"
)

const (
	defaultMaxRemoved = 30 // percent
	defaultDeadline   = 10 * time.Minute
	maxBounds         = 1000 // values of one kind and stage
)

func newRollout() *Rollout {
	return &Rollout{OnFailure: Rollback, Approval: Auto, Deadline: defaultDeadline, FastBack: true}
}

func (r *reader) rollout(n ast.Node, to *Rollout) {
	r.fields(n, "rollout", map[string]func(ast.Node){
		"canary":          into(r, &to.Canary, asAmount),
		"bake":            into(r, &to.Bake, asDuration),
		"max_unavailable": into(r, &to.MaxUnavailable, asUnavailable),
		"max_failures":    into(r, &to.MaxFailures, asAmount),
		"on_failure":      into(r, &to.OnFailure, asOneOf(Rollback, Pause)),
		"approval":        into(r, &to.Approval, asOneOf(Auto, Manual)),
		"deadline":        into(r, &to.Deadline, asPositive),
		"fast_back":       into(r, &to.FastBack, asBool),
	})
}

// asUnavailable parses max_unavailable, and refuses 0: a rollout that may touch no node would never end.
func asUnavailable(s string) (Amount, error) {
	a, err := asAmount(s)
	if err == nil && a.N == 0 {
		err = fmt.Errorf("%q: want at least 1 node, or 1%%", clip(s))
	}
	return a, err
}

func (r *reader) settings(n ast.Node, to *Settings) {
	r.fields(n, SettingsFile, map[string]func(ast.Node){
		"sources":      byStage(r, "sources", &to.Sources, listReader(r, asPrefix), "prod: [s3://acme-releases/]"),
		"dests":        byStage(r, "dests", &to.Dests, listReader(r, asDest), "prod: [/srv]"),
		"users":        byStage(r, "users", &to.Users, listReader(r, asUser), "prod: [app]"),
		"commands":     byStage(r, "commands", &to.Commands, singleReader(r, asBool), "prod: false"),
		"prune":        into(r, &to.Prune, asBool),
		"max_removed":  into(r, &to.MaxRemoved, asPercent),
		"allow_rewind": into(r, &to.AllowRewind, asBool),
		"rollout": func(n ast.Node) {
			to.Rollout = newRollout()
			r.rollout(n, to.Rollout)
		},
		"drift": into(r, &to.Drift, asOneOf(DriftReport, DriftHeal)),
		"freeze": func(n ast.Node) {
			r.each(n, func(item ast.Node) {
				if f, ok := r.freeze(item); ok {
					to.Freeze = append(to.Freeze, f)
				}
			})
		},
	})
}

func asPercent(s string) (int, error) {
	n, err := asNumber(0, 100)(strings.TrimSuffix(s, "%"))
	if err != nil {
		return 0, fmt.Errorf("%q: want a percentage from 0 to 100, as in 30", clip(s))
	}
	return int(n), nil
}

// byStage returns a function that reads a mapping into *to. Its keys are stages, or "*" for every other stage. Errors
// show the text in like as an example.
func byStage[T any](
	r *reader,
	field string,
	to *map[string]T,
	read func(ast.Node) (T, bool),
	like string,
) func(ast.Node) {
	return func(n ast.Node) {
		*to = map[string]T{}
		values, ok := mapping(n)
		if !ok {
			r.noteAt(n, "%s: want a value by stage, as in %s", field, like)
		}
		for _, v := range values {
			stage := keyOf(v)
			if stage != "*" {
				if err := CheckSegment("stage", stage); err != nil {
					r.noteAt(v.Key, "%v; or \"*\" for every stage", err)
					continue
				}
			}
			if _, twice := (*to)[stage]; twice {
				r.noteAt(v.Key, "stage %q is given twice in %s", stage, field)
				continue
			}
			if v.Value == nil || v.Value.Type() == ast.NullType {
				r.noteAt(v.Key, "stage %q has no value in %s: want one, as in %s", stage, field, like)
				continue
			}
			if value, ok := read(v.Value); ok {
				(*to)[stage] = value
			}
		}
	}
}

// listReader returns a function that reads a list of bounds. An empty list is an error, as it could
// mean everything or nothing.
func listReader(r *reader, parse func(string) (string, error)) func(ast.Node) ([]string, bool) {
	return func(n ast.Node) ([]string, bool) {
		before := len(r.problems)
		var list []string
		intoList(r, &list, parse)(n)
		switch {
		case len(r.problems) > before:
		case len(list) == 0:
			r.noteAt(n, "the list is empty: name what is allowed, or remove the line to set no bound here")
		case len(list) > maxBounds:
			r.noteAt(n, "the list has %d items, at most %d are allowed", len(list), maxBounds)
		}
		return list, len(r.problems) == before
	}
}

// singleReader returns a function that reads a single value with parse; ok is false if it noted a
// problem.
func singleReader[T any](r *reader, parse func(string) (T, error)) func(ast.Node) (T, bool) {
	return func(n ast.Node) (value T, ok bool) {
		before := len(r.problems)
		into(r, &value, parse)(n)
		return value, len(r.problems) == before
	}
}

func asPrefix(s string) (string, error) {
	// A bucket alone is a valid prefix, but not the URL of an object.
	if err := CheckSourceURL(strings.TrimSuffix(s, "/") + "/x"); err != nil {
		return "", fmt.Errorf("source %q: %w", clip(ShownURL(s)), err)
	}
	return s, nil
}

// allows reports whether a stage may name a release at url. The stage's own sources decide, or else
// those of "*"; without either, any URL is allowed.
func (s Settings) allows(stage, url string) bool {
	prefixes, set := OfStage(s.Sources, stage)
	return !set || FromSource(url, prefixes)
}

// FromSource reports whether a URL is one of the sources, or lies below one. kedge.yaml and agents share this
// rule.
func FromSource(url string, sources []string) bool {
	return slices.ContainsFunc(sources, func(s string) bool { return url == s || UnderPrefix(url, s) })
}

// UnderPrefix reports whether a URL lies below a prefix by whole path segments: s3://acme/web
// covers s3://acme/web/1, not s3://acme/webx/1. A URL that could be read as another path lies under
// no prefix. Such a URL has an empty segment, ., .., %, \, or a query (but for versionId of s3://).
func UnderPrefix(url, prefix string) bool {
	if at, version, found := strings.Cut(url, "?"); found && strings.HasPrefix(url, "s3://") &&
		s3Version.MatchString(version) {
		url = at
	}
	_, rest, ok := strings.Cut(url, "://")
	if !ok || strings.ContainsAny(rest, "%?\\") {
		return false
	}
	_, at, _ := strings.Cut(rest, "/")
	for segment := range strings.SplitSeq(at, "/") {
		if segment == "" || segment == "." || segment == ".." {
			return false
		}
	}
	return strings.HasPrefix(url, strings.TrimSuffix(prefix, "/")+"/")
}

func (r *reader) freeze(n ast.Node) (Freeze, bool) {
	f := Freeze{Zone: time.UTC, Running: "finish"}
	before := len(r.problems)
	window := func(kind FreezeKind) func(ast.Node) {
		return func(n ast.Node) {
			if f.Kind != "" {
				r.noteAt(n, "a freeze has both deny and allow: want one of them")
			}
			f.Kind = kind
			into(r, &f.Cron, asCron)(n)
		}
	}
	seen := r.fields(n, "freeze", map[string]func(ast.Node){
		"name":     into(r, &f.Name, asText),
		"deny":     window(FreezeDeny),
		"allow":    window(FreezeAllow),
		"duration": into(r, &f.Duration, asPositive),
		"zone":     into(r, &f.Zone, asZone),
		"units":    intoList(r, &f.Units, ParseUnitPattern),
		"running":  into(r, &f.Running, asOneOf("finish", "wait")),
		"reason":   into(r, &f.Reason, asText),
	})
	if f.Kind == "" {
		r.noteAt(n, "a freeze needs the field deny or allow: when its window begins, as five fields of cron")
	}
	if seen["duration"] == nil {
		r.noteAt(n, "a freeze needs a duration")
	}
	return f, len(r.problems) == before
}

func asCron(s string) (string, error) {
	if strings.HasPrefix(strings.TrimSpace(s), "@") || strings.Contains(s, "TZ=") {
		return "", fmt.Errorf("%q: want the five fields of cron, as in \"0 16 * * FRI\", and its time zone in the field zone",
			clip(s))
	}
	schedule, err := cron.ParseStandard(s)
	if err != nil {
		return "", fmt.Errorf("%q: want the five fields of cron, as in \"0 16 * * FRI\": %w", clip(s), err)
	}
	if schedule.Next(time.Unix(0, 0)).IsZero() {
		return "", fmt.Errorf("%q: there is no such day, so the window would never begin", clip(s))
	}
	return s, nil
}

func asZone(s string) (*time.Location, error) {
	zone, err := time.LoadLocation(s)
	if err != nil || s == "" || s == "Local" {
		return nil, fmt.Errorf("zone %q: want a name of the IANA database, as in Europe/Berlin", clip(s))
	}
	return zone, nil
}
