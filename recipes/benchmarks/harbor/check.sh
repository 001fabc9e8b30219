# Run the verifier of a Harbor task, $1/tests/test.sh, and read its reward as Harbor does: 1 is done.
export PATH=/private/bin:$PATH TEST_DIR=$1/tests
mkdir -p /tmp/verifier ~/.local/bin
touch ~/.local/bin/env
bash "$1/tests/test.sh"
exec python3 -I /private/reward.py $?
