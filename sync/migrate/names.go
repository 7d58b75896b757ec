package migrate

import (
	"cmp"
	"fmt"
	"regexp"
	"strings"

	"kedge/deployments"
)

// Naming derives a unit from a manifest's key.
type Naming struct {
	// Patterns are tried in order. {stage}, {role} and {unit} each match at least one character of a path segment; *
	// matches any number of them. .yml and .yaml match each other. A pattern matches the end of a path, from the beginning
	// of a segment. Empty: DefaultPatterns.
	Patterns []string
	// Stage, Role and Unit are the parts that a pattern lacks. A pattern that yields another value for one of them doesn't
	// count as a match.
	Stage, Role, Unit string
}

// DefaultPatterns match the names that capistrano-stretcher gives to manifests.
var DefaultPatterns = []string{"manifest_{role}_{stage}.yml"}

// DefaultUnit is a unit's name if nothing else gives one.
const DefaultUnit = "app"

// check returns an error for a pattern that doesn't parse, which would otherwise look like manifests without a unit.
func (n Naming) check() error {
	for _, pattern := range n.Patterns {
		if _, err := compile(pattern); err != nil {
			return err
		}
	}
	return nil
}

// UnitOf returns the unit of the manifest at a path, and an error if no pattern gives a valid one.
func (n Naming) UnitOf(path string) (deployments.UnitID, error) {
	patterns := n.Patterns
	if len(patterns) == 0 {
		patterns = DefaultPatterns
	}
	for _, pattern := range patterns {
		expression, err := compile(pattern)
		if err != nil {
			return deployments.UnitID{}, err
		}
		found := expression.FindStringSubmatch(path)
		if found == nil {
			continue
		}
		id := deployments.UnitID{Stage: n.Stage, Role: n.Role, Unit: n.Unit}
		matches := true
		for i, name := range expression.SubexpNames() {
			field := map[string]*string{"stage": &id.Stage, "role": &id.Role, "unit": &id.Unit}[name]
			if field == nil {
				continue
			}
			matches = matches && (*field == "" || *field == found[i])
			*field = found[i]
		}
		id.Unit = cmp.Or(id.Unit, DefaultUnit)
		if matches && id.Check() == nil {
			return id, nil
		}
	}
	return deployments.UnitID{}, fmt.Errorf(
		"%s gives no unit: what a --match pattern (%s) finds in its name, with --stage, --role and --unit, has "+
			"to be a valid STAGE/ROLE/UNIT",
		path,
		strings.Join(patterns, ", "),
	)
}

var patternPart = regexp.MustCompile(`\{[^}]*\}|\*`)

// compile converts a pattern to a regular expression.
func compile(pattern string) (*regexp.Regexp, error) {
	var b strings.Builder
	b.WriteString("(?:^|/)")
	seen := map[string]bool{}
	at := 0
	for _, place := range patternPart.FindAllStringIndex(pattern, -1) {
		b.WriteString(regexp.QuoteMeta(pattern[at:place[0]]))
		at = place[1]
		part := pattern[place[0]:place[1]]
		name := strings.Trim(part, "{}")
		switch {
		case part == "*":
			b.WriteString("[^/]*")
		case seen[name]:
			return nil, fmt.Errorf("pattern %q: %s is given twice", pattern, part)
		case name == "stage" || name == "role" || name == "unit":
			fmt.Fprintf(&b, "(?P<%s>[^/]+)", name)
			seen[name] = true
		default:
			return nil, fmt.Errorf("pattern %q: %s is none of {stage}, {role} and {unit}", pattern, part)
		}
	}
	rest := regexp.QuoteMeta(pattern[at:])
	if stem, ok := strings.CutSuffix(strings.TrimSuffix(pattern[at:], ".yaml"), ".yml"); ok || stem != pattern[at:] {
		rest = regexp.QuoteMeta(stem) + `\.ya?ml`
	}
	b.WriteString(rest + "$")
	return regexp.Compile(b.String())
}
