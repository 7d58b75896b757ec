#!/bin/sh
# Publishes a directory as a release, names it in the deployments repo, and waits until the fleet runs it: what the GitHub
# Action and the GitLab template beside this file call. All comes from the environment.
#
#   DIR            what to publish
#   UNITS          units STAGE/ROLE/UNIT that get the release, separated by blanks
#   VERSION        the release's version
#   KEDGE_PUBLISH_TO, NAME, DEST, MANIFEST, SIGN_KEY
#                  as --to, --name, --dest, --manifest and --sign of kedge publish; those that are empty are left out
#   DEPLOYMENTS    the deployments repo, for git clone; BRANCH of it (main)
#   WAIT           how long to wait for the fleet, as in 15m (empty: not at all); Consul by CONSUL_HTTP_ADDR and its like
#   GITHUB_OUTPUT  a file that gets pointer=, commit= and result=
set -eu

: "${DIR:?}" "${UNITS:?}" "${VERSION:?}" "${DEPLOYMENTS:?}"
BRANCH=${BRANCH:-main}
out=${GITHUB_OUTPUT:-/dev/null}

set -- publish "$DIR" --version "$VERSION"
[ -z "${KEDGE_PUBLISH_TO:-}" ] || set -- "$@" --to "$KEDGE_PUBLISH_TO"
[ -z "${NAME:-}" ] || set -- "$@" --name "$NAME"
[ -z "${DEST:-}" ] || set -- "$@" --dest "$DEST"
[ -z "${MANIFEST:-}" ] || set -- "$@" --manifest "$MANIFEST"
[ -z "${SIGN_KEY:-}" ] || set -- "$@" --sign "$SIGN_KEY"
pointer=$(kedge "$@")
echo "published $pointer"
echo "pointer=$pointer" >>"$out"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
git clone -q --depth 1 --branch "$BRANCH" "$DEPLOYMENTS" "$work/repo"
cd "$work/repo"

# Others push as well: what they pushed meanwhile is taken up, and the line changed anew.
tries=0
while :; do
	for unit in $UNITS; do
		file=$unit.yaml
		[ -e "$file" ] || { echo "$file is not in the deployments repo: add it, with release: $pointer" >&2; exit 1; }
		awk -v pointer="$pointer" '
			/^release:/ { sub(/^release:[ \t]*[^ \t#]*/, "release: " pointer); found = 1 }
			{ print }
			END { exit !found }
		' "$file" >"$work/file" || { echo "$file has no line release:" >&2; exit 1; }
		cat "$work/file" >"$file"
	done
	if git diff --quiet; then
		echo "the deployments repo names this release already"
		break
	fi
	git -c user.name="${GIT_AUTHOR_NAME:-kedge}" -c user.email="${GIT_AUTHOR_EMAIL:-kedge@localhost}" \
		commit -qam "${MESSAGE:-deploy ${NAME:-$UNITS} $VERSION}"
	if git push -q origin "HEAD:$BRANCH" 2>"$work/error"; then
		break
	fi
	tries=$((tries + 1))
	if [ "$tries" -ge 5 ]; then
		cat "$work/error" >&2
		exit 1
	fi
	git fetch -q --depth 1 origin "$BRANCH"
	git reset -q --hard FETCH_HEAD
done
commit=$(git rev-parse HEAD)
echo "pushed $commit"
echo "commit=$commit" >>"$out"

[ -n "${WAIT:-}" ] || exit 0
code=0
for unit in $UNITS; do
	kedge wait "$unit" --commit "$commit" --timeout "$WAIT" || code=$?
done
case $code in
0) result=converged ;;
3) result=timeout ;;
*) result=failed ;;
esac
echo "result=$result" >>"$out"
[ -z "${GITHUB_STEP_SUMMARY:-}" ] || {
	echo "### $VERSION: $result"
	echo
	echo '```'
	for unit in $UNITS; do kedge status "$unit"; done
	echo '```'
} >>"$GITHUB_STEP_SUMMARY"
exit "$code"
