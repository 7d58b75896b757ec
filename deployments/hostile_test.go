package deployments

import (
	"fmt"
	"strings"
	"testing"

	"kedge/deployments/fuzzlimit"
)

// Manifests that are read before anybody's signature on them is: they cost little, and so does the error.
func TestHostileManifests(t *testing.T) { // not beside others, whose memory would count
	sixteen := strings.Repeat(`\`, 16)
	long := "{{ $x := `" + strings.Repeat("<", 100_000) + "` }}"
	for name, text := range map[string]string{
		"104,000 ifs":               strings.Repeat("{{if 1}}", 104_000),
		"104,000 ifs that end":      strings.Repeat("{{if 1}}x{{end}}", 50_000),
		"ifs in one another":        strings.Repeat("{{if 1}}", 1500) + strings.Repeat("{{end}}", 1500),
		"a manifest of digits":      strings.Repeat("9", MaxManifest),
		"a field of digits":         "keep: " + strings.Repeat("9", MaxManifest-10),
		"a name without end":        strings.Repeat("x", MaxManifest-2) + ": 1",
		"a checksum without end":    "checksum: " + strings.Repeat("a", MaxManifest-20),
		"a string in a template":    "{{ printf \"%1000s\" \"" + strings.Repeat("a", MaxManifest-100) + "\" }}",
		"brackets in one another":   strings.Repeat("[", MaxManifest),
		"aliases of aliases":        "a: &a [x,x,x,x,x,x,x,x,x]\n" + strings.Repeat("b: &b [*a,*a,*a,*a,*a,*a,*a]\n", 1000),
		"names of variables":        "{{ env" + numbered(" `n%d`") + " }}",
		"variables":                 "{{ print" + numbered(" (env `n%d`)") + " }}",
		"a document of many fields": strings.Repeat("a: 1\n", MaxManifest/5),
		"doubled by print":          "{{ $x := `" + sixteen + "` }}" + strings.Repeat("{{ $x = print $x $x }}", 24),
		"doubled by println":        "{{ $x := `" + sixteen + "` }}" + strings.Repeat("{{ $x = println $x $x }}", 24),
		"doubled by printf":         "{{ $x := `" + sixteen + "` }}" + strings.Repeat("{{ $x = printf `%s%s` $x $x }}", 24),
		"doubled by json_escape":    "{{ $x := `" + sixteen + "` }}" + strings.Repeat("{{ $x = json_escape $x }}", 24),
		"copied often":              long + strings.Repeat("{{ $y := print $x }}", 1900),
		"copied in one action":      long + "{{ print" + strings.Repeat(" (len (print $x $x))", 1900) + " }}",
		"escaped often":             long + strings.Repeat("{{ $y := json_escape $x }}", 1900),
		"compared often":            long + "{{ $y := print $x }}{{ eq $y" + strings.Repeat(" $x", 9000) + " }}",
		"a name read often":         long + "{{ env" + strings.Repeat(" $x", 9000) + " }}",
		"calls in one another": "{{ print" + strings.Repeat(" (print", 9000) + " (not)" +
			strings.Repeat(")", 9000) + " }}",
		"variables looked for": "{{ print" + strings.Repeat(" ($a:=1)", 60_000) + " ($z:=1)" +
			strings.Repeat(" $z", 160_000) + " }}",
		"few variables looked for": "{{ print" + strings.Repeat(" ($a:=1)", 4999) + " ($z:=1)" +
			strings.Repeat(" $z", 5000) + " }}",
		"lines of variables": strings.Repeat("{{ if env `A` }}{{ end }}", maxOutcomes) + "{{ $n := `" +
			strings.Repeat("\n", 1_000_000) + "` }}{{ print $n" + strings.Repeat(" (env `A`)", 10) + " }}",
		"conditions on variables": strings.Repeat("{{ if env `A` }}{{ end }}", maxOutcomes) + "{{ print" +
			strings.Repeat(" 1", 100_000) + " }}",
		"conditions on many fields": strings.Repeat("{{ if env `A` }}{{ end }}", maxOutcomes) +
			strings.Repeat("a: 1\n", maxKeys/5),
		"an unknown function": "{{ " + strings.Repeat("a", MaxManifest-10) + " }}",
		"an odd number":       "{{ 1" + strings.Repeat("0", MaxManifest-10) + " }}",
	} {
		fuzzlimit.Run(t, name, func() {
			_, err := ParseTemplate([]byte(text), manifestURL)
			if _, expanded := ParseManifest(
				[]byte(text),
				manifestURL,
				func(string) (string, bool) { return "", false },
			); err == nil {
				err = expanded
			}
			if name == "ifs in one another" && err == nil {
				return // they are few enough
			}
			if err == nil || len(err.Error()) > 16<<10 {
				t.Errorf("%s: the error has %d bytes: %.300v", name, len(err.Error()), err)
			}
			if strings.HasPrefix(name, "104,000 ifs") && !strings.Contains(err.Error(), "actions ({{ }}), at most") {
				t.Errorf("%s were parsed: %v", name, err)
			}
			if strings.HasPrefix(name, "doubled by") && !strings.Contains(err.Error(), "the result has more than") {
				t.Errorf("%s: it grew beyond a manifest: %v", name, err)
			}
		})
	}
}

// numbered repeats a format, with a number each time, to almost the size of a manifest.
func numbered(format string) string {
	var b strings.Builder
	for i := 0; b.Len() < MaxManifest-100; i++ {
		fmt.Fprintf(&b, format, i)
	}
	return b.String()
}
